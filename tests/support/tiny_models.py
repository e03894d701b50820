"""Small random causal LMs, in memory or saved as model directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, NemotronHConfig, NemotronHForCausalLM

VOCAB = 640
KINDS = ("nemotron_h", "llama")


def make_model(kind: str, pattern: str = "MEM*E", blocks: int = 4) -> Any:
    """Make a random model over VOCAB token ids, states of width 32: a Llama of `blocks`, a NemotronH of `pattern`."""
    torch.manual_seed(0)
    if kind == "llama":
        llama = LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=blocks, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=0,
        )  # fmt: skip
        return LlamaForCausalLM(llama).eval()
    nemotron = NemotronHConfig(
        vocab_size=VOCAB, hidden_size=32, hybrid_override_pattern=pattern, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=16, n_groups=2, chunk_size=16,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, moe_shared_expert_intermediate_size=24,
        intermediate_size=32, n_group=1, topk_group=1, max_position_embeddings=512, initializer_range=0.2,
        bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return NemotronHForCausalLM(nemotron).eval()


def save_model(path: Path, kind: str) -> Path:
    """Write the directory of `make_model(kind)`, and give its path back."""
    make_model(kind).save_pretrained(path)
    return path
