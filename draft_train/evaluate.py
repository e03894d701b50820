"""The offline acceptance of a draft, beside that of the untrained draft and of a bigram table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftcache.draft_train.bigram import bigram_table
from draftcache.draft_train.checkpoint import load_draft, load_state, resolve_checkpoint
from draftcache.draft_train.config import COMPUTE
from draftcache.draft_train.data.frozen import FrozenWeights
from draftcache.draft_train.drafts.protocol import CheckpointState
from draftcache.draft_train.drafts.registry import find_architecture
from draftcache.draft_train.fit import require_fit
from draftcache.draft_train.measure import bigram_hits, draft_hits, measure
from draftcache.draft_train.split_checks import members_of, warn_of_trained
from draftcache.store.common.device import choose_device
from draftcache.store.common.errors import InputError, ManifestMismatchError
from draftcache.store.common.progress import progress_bar
from draftcache.store.reader import StoreReader
from draftcache.store.storage.base import Location


def evaluate(
    *,
    store: Location,
    checkpoint: Path,
    splits: list[str],
    draft_tokens: int = 5,
    bigram_store: Location | None = None,
    bigram_splits: list[str] | None = None,
    device: str = "auto",
    compute: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """Return the acceptance of a draft on splits of a store, beside the untrained draft and a bigram table.

    `checkpoint` is the directory of a checkpoint, the directory of a run (its newest checkpoint counts) or RUN/best.
    `draft_tokens` tokens are proposed per verify step. The bigram table is made only where `bigram_store` or
    `bigram_splits` is given: it counts these splits (by default those that the draft was trained on) of that store (by
    default `store`), which is one more reading of all their token ids. With `compute` "auto" the draft computes as in
    training, on a GPU in bfloat16; "plain" is the reference in float32, several times slower. `progress` shows a bar.

    The result holds JSON values: `checkpoint`, `step`, and under `splits` for each split the figures of `draft`,
    `untrained` and, if it was made, `bigram`, as `AcceptanceCounts.to_json` returns them.

    Raises CheckpointError or ManifestMismatchError where checkpoint and store don't belong together, and InputError for
    a split that is named twice, or that the store does not have.
    """
    if draft_tokens < 1:
        raise InputError(f"--draft-tokens: expected at least 1, found {draft_tokens}")
    if compute not in COMPUTE:
        raise InputError(f"--compute: expected one of {list(COMPUTE)}, found {compute!r}")
    reader = StoreReader(store)
    path = resolve_checkpoint(checkpoint)
    state = load_state(path)
    vocab = require_fit(path, state, reader)
    members = _members(reader, splits, state)
    counted = None
    if bigram_store is not None or bigram_splits is not None:
        counted = _bigram_members(reader, bigram_store, bigram_splits or state.objective["splits"])
    chosen = choose_device(device)
    frozen = FrozenWeights.load(reader, chosen, vocab)
    draft = load_draft(path, state, chosen)
    untrained = find_architecture(state.architecture).build(state.shape, chosen)
    untrained.initialize(int(state.objective["seed"]), frozen, state.objective["head_init"])
    drafts = {
        name: draft_hits(item, frozen, reader, draft_tokens=draft_tokens, compute=compute)
        for name, item in (("draft", draft), ("untrained", untrained))
    }
    if counted is not None:
        drafts["bigram"] = bigram_hits(bigram_table(*counted), chosen)
    result: dict[str, Any] = {"checkpoint": path.name, "step": state.step, "splits": {}}
    tokens = sum(int(reader.index["tokens"][numbers].sum()) for numbers in members.values())
    with progress_bar(total=tokens, unit="tok", unit_scale=True, desc="eval", disable=not progress) as bar:
        for split, numbers in members.items():
            found = measure(
                reader,
                numbers,
                drafts,
                draft_tokens=draft_tokens,
                window=draft.shape.sliding_window,
                device=chosen,
                progress=lambda size: bar.update(size),
            )
            result["splits"][split] = {name: counts.to_json() for name, counts in found.items()}
    return result


def _members(store: StoreReader, splits: list[str], state: CheckpointState) -> dict[str, NDArray[np.int64]]:
    """Return the numbers of the conversations of each split, and say where the draft was trained on some of them."""
    members_of(store, splits, "--splits")  # no split twice
    if state.store_hash == store.manifest.hash:
        for split in splits:
            warn_of_trained(store, split, state.objective["splits"])
    return {split: members_of(store, [split], "--splits") for split in splits}


def _bigram_members(
    store: StoreReader, other: Location | None, splits: list[str]
) -> tuple[StoreReader, NDArray[np.int64]]:
    """Return the store that the bigram table counts, and the numbers of its conversations."""
    counted = StoreReader(other) if other is not None else store
    mine, theirs = store.manifest.tokenizer_hash, counted.manifest.tokenizer_hash
    if mine != theirs:
        raise ManifestMismatchError(f"{counted.location}: expected tokenizer {mine}, found {theirs}")
    return counted, members_of(counted, splits, "--bigram-splits")
