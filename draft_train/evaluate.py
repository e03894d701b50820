"""A draft's offline acceptance beside the untrained draft's and a bigram table's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from draftcache.draft_train.acceptance import bigram_table, measure_acceptance, measure_bigram
from draftcache.draft_train.checkpoint import load_draft, load_state, resolve_checkpoint
from draftcache.draft_train.data.frozen import FrozenWeights
from draftcache.draft_train.drafts.registry import find_architecture
from draftcache.draft_train.fit import require_fit
from draftcache.store.common.device import choose_device
from draftcache.store.common.errors import InputError, ManifestMismatchError
from draftcache.store.reader import StoreReader
from draftcache.store.storage.base import Location


def evaluate(
    *,
    store_path: Location,
    checkpoint: Path,
    splits: list[str],
    draft_tokens: int = 5,
    bigram_store: Location | None = None,
    bigram_splits: list[str] | None = None,
    device_name: str = "auto",
) -> dict[str, Any]:
    """Figures per split for `draft`, `untrained` and `bigram`, each as `AcceptanceCounts.to_json`."""
    if draft_tokens < 1:
        raise InputError(f"--draft-tokens: expected at least 1, found {draft_tokens}")
    store = StoreReader(store_path)
    path = resolve_checkpoint(checkpoint)
    state = load_state(path)
    vocab = require_fit(path, state, store)
    device = choose_device(device_name)
    frozen = FrozenWeights.load(store, device, vocab)
    draft = load_draft(path, state, device)
    untrained = find_architecture(state.architecture).build(state.shape, device)
    untrained.initialize(int(state.objective["seed"]), frozen, state.objective["head_init"])
    table = _bigram(store, bigram_store, bigram_splits or state.objective["splits"])
    result: dict[str, Any] = {"checkpoint": path.name, "step": state.step, "splits": {}}
    for split in splits:
        members = store.members(split)
        result["splits"][split] = {
            "draft": measure_acceptance(draft, frozen, store, members, draft_tokens=draft_tokens).to_json(),
            "untrained": measure_acceptance(untrained, frozen, store, members, draft_tokens=draft_tokens).to_json(),
            "bigram": measure_bigram(table, store, members, draft_tokens=draft_tokens).to_json(),
        }
    return result


def _bigram(store: StoreReader, other: Location | None, splits: list[str]) -> Any:
    counted = StoreReader(other) if other is not None else store
    mine, theirs = store.manifest.tokenizer_hash, counted.manifest.tokenizer_hash
    if mine != theirs:
        raise ManifestMismatchError(f"{counted.location}: expected tokenizer {mine}, found {theirs}")
    return bigram_table(counted, np.concatenate([counted.members(split) for split in splits]))
