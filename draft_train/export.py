"""Export of a checkpoint in the form that an inference engine loads: config.json and model.safetensors.

The draft's architecture decides what these files contain. This module checks them, and then publishes them together or
not at all.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from draftcache.draft_train.checkpoint import load_draft, load_state, load_vocab_map, resolve_checkpoint
from draftcache.draft_train.drafts.protocol import Architecture, CheckpointState
from draftcache.draft_train.drafts.registry import find_architecture
from draftcache.store.common.errors import CheckpointError, InputError
from draftcache.store.common.files import atomic_directory
from draftcache.store.common.tensor_files import save_tensors

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def export(
    checkpoint: Path,
    output: Path,
    *,
    engine: str,
    dtype: str = "bfloat16",
    max_position_embeddings: int | None = None,
    force: bool = False,
) -> Path:
    """Write the served form of a checkpoint (or of a run's newest checkpoint) to the directory `output`; return it.

    `engine` is "vllm" or "sglang", `dtype` one of `DTYPES`. Engines let the draft propose within its
    `max_position_embeddings`, by default those of `served_positions`. An engine that is known not to serve such a draft
    beside its verifier is refused, or with `force` warned of on stderr.

    Raises CheckpointError for an incomplete or mismatched checkpoint, InputError if `output` exists, the draft can't be
    exported for this engine, no number of positions is known, or `force` has nothing to force.
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype: expected one of {list(DTYPES)}, found {dtype!r}")
    if output.exists():
        raise InputError(f"{output}: expected a new directory, found one that exists; remove it or choose another")
    path = resolve_checkpoint(checkpoint)
    state = load_state(path)
    architecture = find_architecture(state.architecture)
    if engine not in architecture.engines:
        raise InputError(
            f"--engine: expected one of {list(architecture.engines)} for a draft of {architecture.name}, "
            f"found {engine!r}"
        )
    _require_served(architecture, state, engine, force)
    positions = served_positions(path, state, max_position_embeddings)
    state = replace(state, verifier=state.verifier | {"max_position_embeddings": positions})
    vocab_map = load_vocab_map(path, state)
    draft = load_draft(path, state, torch.device("cpu"))
    form = draft.served_form(state, vocab_map, engine=engine, dtype=DTYPES[dtype])
    with atomic_directory(output) as partial:
        save_tensors(partial / "model.safetensors", form.tensors, metadata={"format": "pt"})
        (partial / "config.json").write_text(json.dumps(form.config, indent=2) + "\n", encoding="utf-8")
        try:
            architecture.check_served(partial)
        except CheckpointError as exc:
            raise CheckpointError(f"{path}: its draft cannot be served, nothing was exported: {exc}") from exc
    return output


def _require_served(architecture: Architecture, state: CheckpointState, engine: str, force: bool) -> None:
    """Raise InputError where the engine is known not to serve the draft, unless `force`, which has to be needed."""
    reason = architecture.why_not_served(state.verifier, engine)
    if reason is None:
        if force:
            raise InputError(
                f"--force: expected an engine that is known not to serve this draft, found --engine {engine}, of which "
                "nothing is known against it; leave --force out"
            )
        return
    named = f"the draft of {state.verifier['name']}"
    if not force:
        raise InputError(
            f"--engine: expected an engine that serves {named}, found {engine}: {reason}; --force exports it all the "
            "same"
        )
    print(f"draftcache export: warning: {engine} is known not to serve {named}: {reason}", file=sys.stderr)


def served_positions(path: Path, state: CheckpointState, asked: int | None = None) -> int:
    """Return the number of positions that an exported draft declares: `asked`, or else the verifier's own.

    A verifier may name none (its positions are not limited). Then it is the store's longest conversation, rounded up to
    a power of two: longer ones the draft was never trained on. Raises InputError for a number below 1, and where the
    checkpoint `path` knows neither.
    """
    if asked is not None:
        if asked < 1:
            raise InputError(f"--max-position-embeddings: expected at least 1, found {asked}")
        return asked
    if own := state.verifier.get("max_position_embeddings"):
        return int(own)
    if state.longest:
        return 1 << (state.longest - 1).bit_length()
    raise InputError(
        f"{path}: expected the verifier's max_position_embeddings, or the length of the longest conversation, found "
        "neither, as an earlier version of draftcache wrote it; give the length that will be served by "
        "--max-position-embeddings"
    )
