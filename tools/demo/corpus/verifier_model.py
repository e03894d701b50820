"""The demo's verifier: the shape, initialisation, loading and saving of a 12-block NemotronH."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import NemotronHConfig, NemotronHForCausalLM

from draftcache.store.common.files import write_json
from draftcache.store.common.tensor_files import save_tensors
from draftcache.tools.demo.corpus.tokenizer import VOCAB_SIZE

__all__ = ["PATTERN", "build_model", "load_model", "save_model", "set_time_step_limit"]

PATTERN = "MEMEM*EME*ME"
_FP32 = ("A_log", "D", "dt_bias", "e_score_correction_bias")
_CONFIG: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "hybrid_override_pattern": PATTERN,
    "num_hidden_layers": len(PATTERN),
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "intermediate_size": 384,
    "mlp_hidden_act": "relu2",
    "mlp_bias": False,
    "ssm_state_size": 64,
    "mamba_num_heads": 8,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "n_groups": 2,
    "expand": 2,
    "conv_kernel": 4,
    "use_conv_bias": True,
    "chunk_size": 64,
    # Some engines clamp dt from below at time_step_min, others at time_step_limit[0]; training uses (0, inf).
    # A tiny time_step_min makes the two agree to 1e-9.
    "time_step_min": 1e-9,
    "time_step_max": 0.1,
    "time_step_floor": 1e-9,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 192,
    "moe_shared_expert_intermediate_size": 384,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "use_bias": False,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "residual_in_fp32": False,
    "rescale_prenorm_residual": True,
    "hidden_dropout": 0.0,
    "use_cache": True,
    "num_logits_to_keep": 1,
    "dtype": "bfloat16",
}


def build_model(seed: int) -> NemotronHForCausalLM:
    """Return a fresh fp32 model. A is in U[1, 16] and dt log-uniform in [1e-3, 1e-1], as Mamba-2 initialises them."""
    torch.manual_seed(seed)
    fields = {key: value for key, value in _CONFIG.items() if key not in ("architectures", "model_type", "dtype")}
    model = NemotronHForCausalLM(NemotronHConfig(**fields))
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if name.endswith("A_log"):
                parameter.uniform_(1, 16).log_()
            elif name.endswith("dt_bias"):
                dt = torch.empty_like(parameter).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
                parameter.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus(parameter) = dt
            elif name.endswith(("o_proj.weight", "down_proj", "down_proj.weight", "out_proj.weight")):
                parameter.normal_(0, 0.02 / math.sqrt(len(PATTERN)))
    set_time_step_limit(model)
    return model


def set_time_step_limit(model: nn.Module) -> None:
    """Clamp dt to (0, inf) on every Mamba block, as the vendor's code does and Hugging Face's code does not."""
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))  # type: ignore[assignment]


def load_model(directory: Path, dtype: torch.dtype = torch.bfloat16) -> NemotronHForCausalLM:
    """Load a saved verifier for inference, with the right dt limit."""
    model = NemotronHForCausalLM.from_pretrained(directory, dtype=dtype)
    set_time_step_limit(model)
    return model.eval()


def save_model(model: nn.Module, directory: Path) -> None:
    """Write config, generation config and bf16 weights (A_log, D, dt_bias and router biases in fp32).

    Tensors are named as in the published NemotronH checkpoints (`backbone.*`, one tensor per expert), which
    transformers and vLLM both read.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        dtype = torch.float32 if name.endswith(_FP32) else torch.bfloat16
        published = name.replace("model.", "backbone.", 1) if name.startswith("model.") else name
        value = tensor.detach().to("cpu", dtype)
        if published.endswith((".experts.up_proj", ".experts.down_proj")):
            stem, projection = published.rsplit(".", 1)
            for number, expert in enumerate(value):
                tensors[f"{stem}.{number}.{projection}.weight"] = expert.contiguous()
        else:
            tensors[published] = value.contiguous()
    save_tensors(directory / "model.safetensors", tensors, {"format": "pt"})
    write_json(directory / "config.json", _CONFIG)
    ids = {key: _CONFIG[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(directory / "generation_config.json", {"do_sample": False, **ids})
