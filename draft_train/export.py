"""Export of a checkpoint in the form that an inference engine loads: config.json and model.safetensors.

The draft's architecture decides what these files contain. This module checks them, and then publishes them together or
not at all.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from draftcache.draft_train.checkpoint import load_draft, load_state, load_vocab_map, resolve_checkpoint
from draftcache.draft_train.drafts.registry import find_architecture
from draftcache.store.common.errors import CheckpointError, InputError
from draftcache.store.common.files import atomic_directory
from draftcache.store.common.tensor_files import save_tensors

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def export(checkpoint: Path, output: Path, *, engine: str, dtype: str = "bfloat16") -> Path:
    """Write the served form of a checkpoint (or of a run's newest checkpoint) to the directory `output`; return it.

    `engine` is "vllm" or "sglang", `dtype` one of `DTYPES`. Raises CheckpointError for an incomplete or mismatched
    checkpoint, InputError if `output` exists or the draft can't be exported for this engine.
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
