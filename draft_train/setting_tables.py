"""Tables about the settings of a run: choices by name, and settings that only some architectures have.

This module imports no torch. A setting that is left at its neutral value, which is the default of its field, gets the
value that its architecture is published with; one that the architecture does not have must stay neutral, so that no
flag is given in vain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

CHOICES = {
    "step_weights": ("decay", "d-pace"),
    "anchor": ("", "first", "bonus"),
    "block_attention": ("", "causal", "bidirectional", "by-layer"),
    "order": ("shuffle", "bucketed"),
    "out_of_vocab": ("weight", "drop", "keep"),
    "head_init": ("verifier", "random"),
    "compute": ("auto", "fused", "plain"),
    "attention": ("triton", "flash"),
    "track": ("off", "wandb", "wandb-offline", "tensorboard"),
}
"""The values of settings that are chosen by name."""
MEMORY_SETTINGS = (
    "draft", "ttt_steps", "block_size", "anchor", "anchor_share", "num_hidden_layers", "layer_types", "markov_rank",
    "train_embeddings", "train_head", "batch_conversations", "pack_tokens", "loss_chunk", "intermediate_size",
    "num_attention_heads", "num_key_value_heads", "head_dim",
)  # fmt: skip
"""Fields on which the GPU memory of a run depends, beside recompute_mlp, attention, window and draft vocabulary."""
BLOCKS = ("dflash", "dspark")
"""The architectures that draft a block of tokens at once."""

_OWNERS: dict[str, tuple[str, ...]] = {
    "ttt_steps": ("eagle3",),
    "eagle31": ("eagle3",),
    "attention": ("eagle3",),
    "num_hidden_layers": BLOCKS,
    "block_size": BLOCKS,
    "layer_types": BLOCKS,
    "block_attention": BLOCKS,
    "mask_token_id": BLOCKS,
    "attention_sinks": BLOCKS,
    "train_embeddings": BLOCKS,
    "train_head": BLOCKS,
    "anchor_share": BLOCKS,
    "anchor": ("dspark",),
    "markov_rank": ("dspark",),
    "confidence_head": ("dspark",),
}
"""By setting, the built-in architectures that have it."""
_DEFAULTS: dict[str, dict[str, Any]] = {
    "eagle3": {"ttt_steps": 6, "loss": "tail-kl", "step_decay": 0.8},
    "dflash": {"num_hidden_layers": 5, "block_size": 8, "block_attention": "by-layer", "loss": "tail-kl"},
    "dspark": {
        "num_hidden_layers": 5,
        "block_size": 8,
        "block_attention": "by-layer",
        "anchor": "first",
        "markov_rank": 256,
        "loss": "ce-l1",
    },
}
"""By architecture, what a setting at its neutral value stands for. Registered architectures take those of eagle3."""


def own_values(values: Mapping[str, Any], neutral: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that `values` leaves at their `neutral` values and the architecture `values["draft"]` fills.

    The decay of a block draft's slots is exp(-1 / gamma). DSpark is published with gamma 4, DFlash with 4, 5 and 7 for
    blocks of 8, 10 and 16 slots.
    """
    draft = values["draft"]
    defaults = dict(_DEFAULTS.get(draft, _DEFAULTS["eagle3"]))
    if draft in BLOCKS:
        size = values["block_size"] or defaults["block_size"]
        gamma = 4 if draft == "dspark" or size < 10 else 5 if size < 16 else 7
        defaults["step_decay"] = math.exp(-1 / gamma)
    return {name: value for name, value in defaults.items() if values[name] == neutral[name]}


def foreign_setting(values: Mapping[str, Any], neutral: Mapping[str, Any]) -> tuple[str, tuple[str, ...]] | None:
    """Return a setting that is not neutral though the architecture does not have it, with those that do; else None."""
    draft = values["draft"]
    if draft not in _DEFAULTS:
        return None  # a registered architecture reads what it likes
    for name, owners in _OWNERS.items():
        if draft not in owners and values[name] != neutral[name]:
            return name, owners
    return None
