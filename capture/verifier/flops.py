"""FLOPs of a verifier's forward pass by its config.json: how they add up, and stacks of attention and gated MLPs.

Neither this module nor `nemotron.flops` needs torch, so that `draftcache size` starts fast. `family_flops` chooses
between them by the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

# Decoder stacks of query, key, value, output and gated (3-matrix) MLPs, dense or of routed experts.
_GATED = {
    "gemma", "gemma2", "gemma3_text", "gpt_oss", "granite", "llama", "mistral", "mixtral", "olmo2", "olmoe", "phi3",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Matrix work of a forward pass; a multiply and an add count as 2."""

    body: float
    """Per token: projections, experts that are active, scan."""
    per_key: float
    """Per token and key that it attends to, of one attention block."""
    windows: tuple[int | None, ...]
    """One per attention block: its window, or None for full causal attention."""
    head: float
    """Per position whose logits are computed."""

    def total(self, lengths: FloatArray, heads: float) -> float:
        """FLOPs of conversations of these lengths [N] in tokens, with logits at `heads` positions."""
        pairs = sum(float(self._pairs(lengths, window).sum()) for window in self.windows)
        return self.body * float(lengths.sum()) + self.per_key * pairs + self.head * heads

    def _pairs(self, lengths: FloatArray, window: int | None) -> FloatArray:
        reach = lengths if window is None else np.minimum(lengths, window)
        return reach**2 / 2 + (lengths - reach) * reach


def attention_flops(config: Mapping[str, Any]) -> tuple[float, float]:
    """FLOPs per token of the four projections, and per token and key of scores and their weighted sum."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = (config.get("head_dim") or hidden // heads) * heads
    keys = width // heads * (config.get("num_key_value_heads") or heads)
    return 2.0 * hidden * (2 * width + 2 * keys), 4.0 * width


def gated_flops(config: Mapping[str, Any]) -> Flops | None:
    """FLOPs of a stack of attention and gated MLPs; None for any other `model_type`.

    Raises KeyError for a config without a field that the formula needs.
    """
    if config.get("model_type") not in _GATED:
        return None
    hidden, blocks = config["hidden_size"], config["num_hidden_layers"]
    experts = config.get("num_experts") or config.get("num_local_experts")
    dense = set(config.get("mlp_only_layers") or ()) if experts else set(range(blocks))
    step = config.get("decoder_sparse_step") or 1
    dense |= {block for block in range(blocks) if (block + 1) % step}
    mlp = 6.0 * hidden * config["intermediate_size"]
    routed = 0.0
    if experts:
        width = config.get("moe_intermediate_size") or config["intermediate_size"]
        chosen = config["num_experts_per_tok"] * width + (config.get("shared_expert_intermediate_size") or 0)
        routed = 6.0 * hidden * chosen + 2.0 * hidden * experts
    attention, per_key = attention_flops(config)
    kinds = config.get("layer_types")
    if kinds is None:
        slides = config.get("sliding_window") is not None and config.get("use_sliding_window", True)
        kinds = ["sliding_attention" if slides else "full_attention"] * blocks
    return Flops(
        body=blocks * attention + len(dense) * mlp + (blocks - len(dense)) * routed,
        per_key=per_key,
        windows=tuple(config["sliding_window"] if kind == "sliding_attention" else None for kind in kinds),
        head=2.0 * hidden * config["vocab_size"],
    )
