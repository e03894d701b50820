"""What exports of every architecture share: fields of config.json, and maps of draft ids (d2t, t2d)."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from draftcache.draft_train.drafts.protocol import CheckpointState
from draftcache.draft_train.drafts.serving_target import ServingTarget
from draftcache.draft_train.drafts.sizes import Shape
from draftcache.store.common.errors import CheckpointError
from draftcache.store.format.vocab_map import VocabMap


def common_config(shape: Shape, state: CheckpointState, target: ServingTarget, dtype: str) -> dict[str, Any]:
    """Return the fields of config.json that are Llama's and Qwen's alike. `dtype` is the name of the weights' dtype.

    RoPE is written twice, as configs of transformers 4 and 5 have it.
    """
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
        "rope_parameters": {"rope_type": "default", "rope_theta": values["rope_theta"]},
        "attention_bias": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": verifier["max_position_embeddings"],
        "bos_token_id": verifier["bos_token_id"],
        "eos_token_id": verifier["eos_token_id"],
        "pad_token_id": verifier["pad_token_id"],
        "vocab_size": shape.vocab_size,
        "draft_vocab_size": shape.draft_vocab_size,
        # Information for people and for the check of an export: outputs of these blocks, counted from 0. No engine was
        # found that reads this field.
        "target_hidden_state_indices": [tap["layer"] for tap in state.taps],
        "draftcache": {
            "engine": target.engine,
            "engine_version": target.version,
            "draft_vocab_hash": state.draft_vocab_hash,
            "store_hash": state.store_hash,
            "verifier": verifier["name"],
            "verifier_weights_hash": verifier["weights_hash"],
            "verifier_model_type": verifier.get("model_type"),
            "verifier_layers": verifier.get("layers"),
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


def block_numbers(state: CheckpointState) -> list[int]:
    """Return the blocks, counted from 0, whose outputs the draft reads. Raises CheckpointError for other taps."""
    if wrong := [tap for tap in state.taps if tap["point"] != "output"]:
        raise CheckpointError(f"expected taps at block outputs, found {wrong}")
    blocks = [int(tap["layer"]) for tap in state.taps]
    if blocks != sorted(set(blocks)):
        raise CheckpointError(f"expected ascending, distinct blocks, found {blocks}")
    return blocks


def sglang_window(window: int) -> str:
    """Return the flag by which SGLang gives an Eagle3 draft its window; it does not read the draft's config for that.

    SGLang counts positions before the query's own (FlashAttention's and FlashInfer's backends of 0.5.12 to 0.5.23). In
    the later steps of a draft its Triton backend has no window in 0.5.12, and one that counts the query in 0.5.23.
    """
    return f"--speculative-draft-window-size {window - 1}"


def serve_command(
    method: str, target: ServingTarget, verifier: str, draft: str, tokens: int, window: int | None = None
) -> str:
    """Return the command that serves `verifier` with the `draft` in this directory, `tokens` per verify step.

    `method` is vLLM's name of the way in which it drafts. `window` is that of an Eagle3 draft in positions, the query's
    own among them; None for full attention.
    """
    if target.engine == "vllm":
        settings = json.dumps({"method": method, "model": draft, "num_speculative_tokens": tokens})
        return f"vllm serve {verifier} --speculative-config '{settings}'"
    lines = [
        f"python -m sglang.launch_server --model-path {verifier}",
        f"--speculative-algorithm {method.upper()} --speculative-draft-model-path {draft}",
    ]
    if method == "eagle3":
        lines.append(
            f"--speculative-num-steps {tokens} --speculative-eagle-topk 1 --speculative-num-draft-tokens {tokens + 1}"
        )
        if window is not None:
            lines.append(sglang_window(window))
    return " \\\n  ".join(lines)
