"""A verifier of the 30B model's shape with random weights, made on the GPU: its times are real, its values are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from draftcache.capture.verifier.ssm_precision import lift_dt_limit, mamba_mixers, stand_in_for_extension

PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
LAYERS = (2, 26, 48)
DRAFT_VOCAB = 32_000
_OUTPUTS = {"out_proj", "o_proj", "down_proj"}
"""Matrices whose products blocks add to the residual stream."""
_OUTPUT_STD = 0.02 / len(PATTERN) ** 0.5
"""Such that all blocks together add what one would with 0.02; NemotronH's own initialisation divides so too."""


def verifier_config(pattern: str = PATTERN) -> Any:
    """Return the config of Nemotron-3-Nano-30B-A3B; another `pattern` of blocks makes the model shorter."""
    from transformers import NemotronHConfig

    return NemotronHConfig(
        vocab_size=131072, hidden_size=2688, hybrid_override_pattern=pattern, num_attention_heads=32,
        num_key_value_heads=2, head_dim=128, mamba_num_heads=64, mamba_head_dim=64, ssm_state_size=128, n_groups=8,
        conv_kernel=4, chunk_size=128, n_routed_experts=128, num_experts_per_tok=6, moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712, intermediate_size=1856, n_group=1, topk_group=1,
        routed_scaling_factor=2.5, norm_topk_prob=True, max_position_embeddings=262144, layer_norm_epsilon=1e-5,
        tie_word_embeddings=False, mlp_hidden_act="relu2",
    )  # fmt: skip


def fill(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Fill a weight of this name with what a trained one looks like: small random numbers, ones, zeros, decay rates.

    Embeddings are large beside what the blocks add. Where the blocks outweigh them, as with equal numbers everywhere,
    50 blocks amplify every rounding: states of two kernels, or of one GPU and two, then differ by a half at the end,
    where those of trained weights differ by 0.01, and the check at a capture's start refuses them.
    """
    parts = name.split(".")
    if parts[-1] == "A_log":
        tensor.copy_(torch.arange(1, tensor.shape[0] + 1, device=tensor.device).log())
    elif parts[-1] == "dt_bias":
        tensor.copy_(torch.linspace(-6.9, -2.2, tensor.shape[0], device=tensor.device))
    elif tensor.dim() == 1:
        tensor.fill_(0.0 if parts[-1] in ("bias", "e_score_correction_bias") else 1.0)
    elif "embeddings" in parts:
        tensor.normal_(0.0, 1.0, generator=generator)
    else:
        tensor.normal_(0.0, _OUTPUT_STD if _OUTPUTS & set(parts) else 0.02, generator=generator)


@torch.no_grad()
def random_verifier(config: Any, device: torch.device, seed: int = 0) -> Any:
    """Return a NemotronH in bf16 with small random weights, which never are in host memory; its dt limit is lifted."""
    stand_in_for_extension()
    from transformers import NemotronHForCausalLM

    with torch.device("meta"):
        model = NemotronHForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device=device)
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        fill(name, tensor, generator)
    for mixer in mamba_mixers(model):
        for name in ("A_log", "D", "dt_bias"):
            parameter = getattr(mixer, name)
            parameter.data = parameter.data.float()
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias = nn.Buffer(module.e_score_correction_bias.float())
    lift_dt_limit(mamba_mixers(model))
    return model.eval().requires_grad_(False)


def save_random_verifier(path: Path, config: Any, device: torch.device) -> None:
    """Save a random verifier as a model directory, for commands that load one."""
    random_verifier(config, device).save_pretrained(path)
