"""What exports of every architecture share: fields of config.json, maps of draft ids (d2t, t2d), and checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from draftcache.draft_train.drafts.protocol import CheckpointState
from draftcache.draft_train.drafts.sizes import Shape
from draftcache.store.common.errors import CheckpointError
from draftcache.store.format.vocab_map import VocabMap


def common_config(shape: Shape, state: CheckpointState, engine: str, dtype: str) -> dict[str, Any]:
    """Return the fields of config.json that are Llama's and Qwen's alike. `dtype` is the name of the weights' dtype."""
    verifier, values = state.verifier, asdict(shape)
    sizes = (
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "rope_theta",
    )
    return {
        "hidden_size": shape.hidden_size,
        "target_hidden_size": shape.hidden_size,
        **{name: values[name] for name in (*sizes, "rms_norm_eps", "rope_theta")},
        "hidden_act": "silu",
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": verifier["max_position_embeddings"],
        "bos_token_id": verifier["bos_token_id"],
        "eos_token_id": verifier["eos_token_id"],
        "pad_token_id": verifier["pad_token_id"],
        "vocab_size": shape.vocab_size,
        "draft_vocab_size": shape.draft_vocab_size,
        "draftcache": {
            "engine": engine,
            "draft_vocab_hash": state.draft_vocab_hash,
            "store_hash": state.store_hash,
            "verifier": verifier["name"],
            "verifier_weights_hash": verifier["weights_hash"],
            "step": state.step,
        },
        "dtype": dtype,
    }


def vocab_tensors(shape: Shape, vocab_map: VocabMap) -> dict[str, Tensor]:
    """Return d2t and t2d. t2d is as long as the verifier's head, which may have padding rows after the tokenizer's.

    Raises CheckpointError where the map is not the draft's.
    """
    if len(vocab_map) != shape.draft_vocab_size or vocab_map.vocab_size > shape.vocab_size:
        raise CheckpointError(
            f"expected a map of {shape.draft_vocab_size} of at most {shape.vocab_size} ids, "
            f"found {len(vocab_map)} of {vocab_map.vocab_size}"
        )
    t2d = torch.zeros(shape.vocab_size, dtype=torch.bool)
    t2d[: vocab_map.vocab_size] = torch.from_numpy(vocab_map.t2d)
    return {"d2t": torch.from_numpy(vocab_map.d2t.copy()), "t2d": t2d}


def require_same_map(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where the d2t and t2d of an export are missing or name other ids."""
    if missing := sorted({"d2t", "t2d"} - tensors.keys()):
        raise CheckpointError(f"{path}: expected d2t and t2d, missing {missing}")
    d2t = tensors["d2t"]
    targets = d2t + torch.arange(d2t.shape[0])
    if not torch.equal(targets, torch.nonzero(tensors["t2d"])[:, 0]):
        raise CheckpointError(f"{path}: expected d2t and t2d to name the same target ids, found them to differ")


def require_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where a weight of an export is NaN or infinite."""
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(f"{path}: {name}: expected finite weights, found NaN or infinity")
