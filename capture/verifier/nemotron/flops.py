"""FLOPs of NemotronH by its config.json, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from draftcache.capture.verifier.flops import Flops, attention_flops

_KINDS = {
    "M": "mamba", "E": "moe", "*": "attention", "-": "mlp", "linear_attention": "mamba", "full_attention": "attention",
}  # fmt: skip


def nemotron_flops(config: Mapping[str, Any]) -> Flops | None:
    """FLOPs of a NemotronH; None for any other `model_type`.

    Raises KeyError for a config without a field that the formula needs.
    """
    if config.get("model_type") != "nemotron_h":
        return None
    hidden, heads = config["hidden_size"], config["mamba_num_heads"]
    groups, state, chunk = config["n_groups"], config["ssm_state_size"], config.get("chunk_size", 128)
    inner = heads * config["mamba_head_dim"]
    projections = hidden * (2 * inner + 2 * groups * state + heads) + inner * hidden
    # The chunked scan: states in and out, then the scores of a chunk (per group) and their sum over its inputs.
    scan = 2 * inner * state + groups * state * chunk + inner * chunk
    conv = config.get("conv_kernel", 4) * (inner + 2 * groups * state)
    latent = config.get("moe_latent_size") or hidden
    routed = 2 * latent * config["moe_intermediate_size"] * config["num_experts_per_tok"] + (
        2 * hidden * latent if latent != hidden else 0
    )
    shared = 2 * hidden * config["moe_shared_expert_intermediate_size"] * config.get("n_shared_experts", 1)
    attention, per_key = attention_flops(config)
    costs = {
        "mamba": 2.0 * (projections + scan + conv),
        "moe": 2.0 * (routed + shared + hidden * config["n_routed_experts"]),
        "mlp": 4.0 * hidden * config["intermediate_size"],
        "attention": attention,
    }
    blocks = config.get("layers_block_type") or config.get("layer_types") or config["hybrid_override_pattern"]
    kinds = [_KINDS.get(block, block) for block in blocks]
    return Flops(
        body=sum(costs[kind] for kind in kinds),
        per_key=per_key,
        windows=(None,) * kinds.count("attention"),
        head=2.0 * hidden * config["vocab_size"],
    )
