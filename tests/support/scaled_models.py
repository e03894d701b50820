"""Small random verifiers of families that scale or cap their logits, or whose final norm is not Llama's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from support.tiny_models import VOCAB

_COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
_OWN: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 8.0},
    "nanochat": {"final_logit_softcapping": 8.0},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 7.0},
    "minicpm3": {
        "dim_model_base": 10, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 8, "num_key_value_heads": 4,
    },
    "falcon_h1": {
        "lm_head_multiplier": 0.04, "head_dim": 8, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16,
        "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_chunk_size": 16,
    },
    "olmo": {},
    "stablelm": {},
    "phi": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}  # fmt: skip


def make_scaled(kind: str, **changes: Any) -> Any:
    """Make a random model of this family over VOCAB token ids, of 4 blocks of width 32, whose logits reach 20 to 50.

    Weights of norms are random, between 0.5 and 1.5 or, where 1 is added to them, between -0.5 and 0.5.
    """
    torch.manual_seed(0)
    values = _COMMON | _OWN[kind] | changes
    if kind == "opt":
        values = {
            name: value for name, value in values.items() if name not in ("intermediate_size", "num_key_value_heads")
        }
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values)).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(50)
        for name, parameter in model.named_parameters():
            if "norm" in name and parameter.ndim == 1:
                parameter.add_(torch.rand(parameter.shape) - 0.5)
    return model


def save_scaled(path: Path, kind: str, **changes: Any) -> Path:
    """Write the directory of `make_scaled`, and give its path back."""
    make_scaled(kind, **changes).save_pretrained(path)
    return path
