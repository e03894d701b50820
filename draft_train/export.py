"""Export in the classic Eagle3 form: config.json and model.safetensors, as inference engines load them.

Traps that the engines do not report: aux ids in another convention, or only nested, cost most of the acceptance;
a missing lm_head falls back to the verifier's; a missing d2t maps draft id i to target id i; `sliding_window`
without `layer_types` is full attention. So everything is written, and an incomplete checkpoint is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from draftcache.draft_train.checkpoint import (
    CheckpointState,
    load_model,
    load_state,
    load_vocab_map,
    resolve_checkpoint,
)
from draftcache.store.common.errors import CheckpointError, InputError
from draftcache.store.common.files import atomic_directory
from draftcache.store.format.vocab_map import VocabMap

ENGINES = ("vllm", "sglang")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def aux_layer_ids(taps: list[dict[str, Any]], engine: str) -> list[int]:
    """Aux ids for an engine, from taps that are outputs of blocks.

    vLLM's id k is the state before its layer k, so the output of block i is i + 1. SGLang's classic loader adds
    one itself, so there it is i.
    """
    if engine not in ENGINES:
        raise InputError(f"--engine: expected one of {ENGINES}, found {engine!r}")
    wrong = [tap for tap in taps if tap["point"] != "output"]
    if wrong:
        raise CheckpointError(f"expected taps at block outputs, found {wrong}")
    ids = [int(tap["layer"]) + (1 if engine == "vllm" else 0) for tap in taps]
    if ids != sorted(set(ids)):
        raise CheckpointError(f"expected ascending, distinct aux layers, found {ids}")
    return ids


def export_config(state: CheckpointState, engine: str, dtype: str) -> dict[str, Any]:
    """config.json of the exported draft."""
    shape, verifier = state.shape, state.verifier
    ids = aux_layer_ids(state.taps, engine)
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "target_hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": verifier["max_position_embeddings"],
        "bos_token_id": verifier["bos_token_id"],
        "eos_token_id": verifier["eos_token_id"],
        "pad_token_id": verifier["pad_token_id"],
        "vocab_size": shape.vocab_size,
        "draft_vocab_size": shape.draft_vocab_size,
        "sliding_window": shape.sliding_window,
        "layer_types": ["sliding_attention" if shape.sliding_window else "full_attention"],
        "use_sliding_window": shape.sliding_window is not None,
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": ids,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": ids, "use_aux_hidden_state": True},
        # For readers; no engine was found that reads it: outputs of these blocks, counted from 0.
        "target_hidden_state_indices": [tap["layer"] for tap in state.taps],
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


def export_draft(checkpoint: Path, output: Path, *, engine: str, dtype: str = "bfloat16") -> Path:
    """Write the served form of a checkpoint (or of the newest one of a run) to `output`.

    Raises CheckpointError for an incomplete or mismatched checkpoint, InputError if `output` exists.
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype: expected one of {list(DTYPES)}, found {dtype!r}")
    if output.exists():
        raise InputError(f"{output}: expected a new directory, found one that exists; remove it or choose another")
    path = resolve_checkpoint(checkpoint)
    state = load_state(path)
    vocab_map = load_vocab_map(path, state)
    config = export_config(state, engine, dtype)
    model = load_model(path, state, torch.device("cpu"))
    tensors = {name: value.to(DTYPES[dtype]).contiguous() for name, value in model.state_dict().items()}
    tensors |= _vocab_tensors(vocab_map, state)
    with atomic_directory(output) as partial:
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    check_export(output)
    return output


def _vocab_tensors(vocab_map: VocabMap, state: CheckpointState) -> dict[str, torch.Tensor]:
    """d2t and t2d, t2d widened to the verifier's head where that has padding rows beyond the tokenizer's ids."""
    if len(vocab_map) != state.shape.draft_vocab_size or vocab_map.vocab_size > state.shape.vocab_size:
        raise CheckpointError(
            f"expected a map of {state.shape.draft_vocab_size} of at most {state.shape.vocab_size} ids, "
            f"found {len(vocab_map)} of {vocab_map.vocab_size}"
        )
    t2d = torch.zeros(state.shape.vocab_size, dtype=torch.bool)
    t2d[: vocab_map.vocab_size] = torch.from_numpy(vocab_map.t2d)
    return {"d2t": torch.from_numpy(vocab_map.d2t.copy()), "t2d": t2d}


def check_export(path: Path) -> None:
    """Read an export back: every tensor finite, no wrong name, vocabulary tensors that agree with each other."""
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(path / "model.safetensors")
    required = {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"}
    missing = sorted(required - tensors.keys())
    if missing or not any(name.startswith("midlayer.") for name in tensors):
        raise CheckpointError(f"{path}: expected {sorted(required)} and midlayer.*, missing {missing}")
    d2t = tensors["d2t"]
    targets = d2t + torch.arange(d2t.shape[0])
    if not torch.equal(targets, torch.nonzero(tensors["t2d"])[:, 0]):
        raise CheckpointError(f"{path}: expected d2t and t2d to name the same target ids, found them to differ")
    if tensors["lm_head.weight"].shape[0] != config["draft_vocab_size"]:
        raise CheckpointError(f"{path}: expected {config['draft_vocab_size']} head rows")
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(f"{path}: {name}: expected finite weights, found NaN or infinity")
