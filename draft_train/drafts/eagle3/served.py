"""The classic Eagle3 form: config.json and model.safetensors, as inference engines load them.

Engines do not report these mistakes. Tap ids in another engine's convention, or only nested in `eagle_config`, cost
most of the acceptance. A missing lm_head falls back to the verifier's. A missing d2t maps draft id i to target id i. A
`sliding_window` without `layer_types` is full attention. So every field is written, and an incomplete checkpoint is
refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from draftcache.draft_train.drafts.eagle3.shape import Eagle3Shape
from draftcache.draft_train.drafts.protocol import CheckpointState, ServedForm
from draftcache.draft_train.drafts.served_parts import common_config, require_finite, require_same_map, vocab_tensors
from draftcache.store.common.errors import CheckpointError, InputError
from draftcache.store.common.files import read_json
from draftcache.store.format.vocab_map import VocabMap

ENGINES = ("vllm", "sglang")


def tap_ids(taps: list[dict[str, Any]], engine: str) -> list[int]:
    """Return the ids by which an engine knows the taps, which are block outputs as the store's manifest lists them.

    vLLM's id k is the state before its layer k, so the output of block i has id i + 1. SGLang's classic loader adds
    one itself, so there the id is i. Raises InputError for another engine, CheckpointError for taps that have no id.
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


def why_not_served(verifier: dict[str, Any], engine: str) -> str | None:
    """Return why `engine` can't serve an Eagle3 draft beside this verifier, and what to do; None where it can.

    The class is compared where a manifest of an earlier version names no type.
    """
    nemotron = verifier.get("model_type") == "nemotron_h" or verifier.get("architecture") == "NemotronHForCausalLM"
    if engine != "sglang" or not nemotron:
        return None
    return (
        "SGLang's NemotronH hands its states to DFlash drafts and not to Eagle3 drafts (as of August 2026); serve this "
        "one with vLLM, which takes --engine vllm, or train another with --draft dflash"
    )


def served_config(shape: Eagle3Shape, state: CheckpointState, engine: str, dtype: str) -> dict[str, Any]:
    """Return config.json of the exported draft. `dtype` is the name of its weights' dtype."""
    ids = tap_ids(state.taps, engine)
    return common_config(shape, state, engine, dtype) | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "mlp_bias": False,
        "sliding_window": shape.sliding_window,
        "layer_types": ["sliding_attention" if shape.sliding_window else "full_attention"],
        "use_sliding_window": shape.sliding_window is not None,
        "norm_before_residual": False,
        # Eagle3.1. vLLM takes a field that is not written for False, and then refuses the norms' tensors, but carries
        # the un-normed state without a word.
        "fc_norm": shape.fc_norm,
        "norm_output": shape.norm_output,
        "eagle_aux_hidden_state_layer_ids": ids,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": ids, "use_aux_hidden_state": True},
        # Information for people: outputs of these blocks, counted from 0. No engine was found that reads this field.
        "target_hidden_state_indices": [tap["layer"] for tap in state.taps],
    }


def served_form(
    shape: Eagle3Shape,
    model: nn.Module,
    state: CheckpointState,
    vocab_map: VocabMap,
    *,
    engine: str,
    dtype: torch.dtype,
) -> ServedForm:
    """Return config.json, and the model's tensors in `dtype` with d2t int64 [D] and t2d bool [V] beside them."""
    config = served_config(shape, state, engine, str(dtype).removeprefix("torch."))
    tensors = {name: value.to(dtype).contiguous() for name, value in model.state_dict().items()}
    return ServedForm(config, tensors | vocab_tensors(shape, vocab_map))


def check_served(path: Path) -> None:
    """Read an export back. Raises CheckpointError for tensors that are missing or not finite, or disagreeing maps."""
    config = read_json(path / "config.json")
    tensors = load_file(path / "model.safetensors")
    required = {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"}
    missing = sorted(required - tensors.keys())
    if missing or not any(name.startswith("midlayer.") for name in tensors):
        raise CheckpointError(f"{path}: expected {sorted(required)} and midlayer.*, missing {missing}")
    require_same_map(path, tensors)
    if not config["max_position_embeddings"]:
        raise CheckpointError(f"{path}: expected max_position_embeddings above 0, found none: engines need it")
    _check_norms(path, config, tensors)
    if tensors["lm_head.weight"].shape[0] != config["draft_vocab_size"]:
        raise CheckpointError(f"{path}: expected {config['draft_vocab_size']} head rows")
    require_finite(path, tensors)


def _check_norms(path: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """Raise CheckpointError where config.json doesn't say which norms run, or the taps' norms are not there by it."""
    for name in ("fc_norm", "norm_output"):
        if not isinstance(config.get(name), bool):
            raise CheckpointError(f"{path}: expected {name} to be true or false, found {config.get(name)!r}")
    taps = len(config["eagle_aux_hidden_state_layer_ids"]) if config["fc_norm"] else 0
    expected = [f"fc_norm.{number}.weight" for number in range(taps)]
    if (found := sorted(name for name in tensors if name.startswith("fc_norm."))) != sorted(expected):
        raise CheckpointError(f"{path}: expected the norms of the taps {expected}, found {found}")
