"""The form in which engines load a block draft: config.json and model.safetensors.

vLLM loads DSpark as `Qwen3DSparkModel` and DFlash as `DFlashDraftModel`, both of model type qwen3 (vLLM 0.26 to 0.32).
It takes the width of `fc` and the taps from `dflash_config.target_layer_ids`, where ids are those of block outputs. A
layer that slides is causal and a full one is not, unless `dflash_config.causal` says so for all. Missing embeddings
are the verifier's; so is a missing head, if the draft vocabulary is the verifier's. SGLang's DFlash worker always uses
the verifier's embeddings and head, so it serves only drafts that have none of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from draftcache.draft_train.drafts.block.shape import BlockShape
from draftcache.draft_train.drafts.protocol import CheckpointState, ServedForm
from draftcache.draft_train.drafts.served_parts import common_config, require_finite, require_same_map, vocab_tensors
from draftcache.store.common.errors import CheckpointError
from draftcache.store.common.files import read_json
from draftcache.store.format.head_form import HeadForm
from draftcache.store.format.vocab_map import VocabMap

ENGINES = {"dflash": ("vllm", "sglang"), "dspark": ("vllm",)}
"""By architecture, the engines that load it."""
_ARCHITECTURES = {"dflash": "DFlashDraftModel", "dspark": "Qwen3DSparkModel"}
_TYPES = {"sliding": "sliding_attention", "full": "full_attention"}


def served_config(
    name: str, shape: BlockShape, state: CheckpointState, engine: str, dtype: str, *, own_head: bool
) -> dict[str, Any]:
    """Return config.json of the exported draft `name`. `dtype` is the name of its weights' dtype.

    `own_head` says whether the weights hold a head. Raises CheckpointError for what the engine can't load.
    """
    if wrong := [tap for tap in state.taps if tap["point"] != "output"]:
        raise CheckpointError(f"expected taps at block outputs, found {wrong}")
    if shape.mask_token_id < 0:
        raise CheckpointError("expected a mask token, found none")
    if engine == "sglang":
        _require_sglang(shape, own_head)
    ids = [int(tap["layer"]) for tap in state.taps]
    by_layer = tuple(kind == "sliding" for kind in shape.layer_types)
    of_block = {"mask_token_id": shape.mask_token_id, "target_layer_ids": ids, "block_size": shape.block_size}
    if shape.causal != by_layer:
        of_block["causal"] = all(shape.causal)
    if shape.attention_sinks:
        of_block["attention_sink_bias"] = True
    config = common_config(shape, state, engine, dtype) | {
        "architectures": [_ARCHITECTURES[name]],
        "model_type": "qwen3",
        "num_hidden_layers": shape.num_hidden_layers,
        "num_target_layers": state.verifier.get("layers"),
        "sliding_window": shape.window,
        "use_sliding_window": shape.window is not None,
        "max_window_layers": 0,
        "layer_types": [_TYPES[kind] for kind in shape.layer_types],
        "block_size": shape.block_size,
        "mask_token_id": shape.mask_token_id,
        "target_layer_ids": ids,
        "dflash_config": of_block,
    }
    if name == "dspark":
        # vLLM 0.26 reads the first name of the layout, and 0.32 the second.
        config |= {"dspark_bonus_anchor": shape.bonus_anchor, "sample_from_anchor": not shape.bonus_anchor}
        config |= {"markov_rank": shape.markov_rank, "block_size": shape.steps}
        if shape.confidence_head:
            config |= {"enable_confidence_head": True, "confidence_head_with_markov": True}
    return config


def _require_sglang(shape: BlockShape, own_head: bool) -> None:
    """Raise CheckpointError for what SGLang's DFlash worker does not load."""
    found = {
        "a draft vocabulary smaller than the verifier's": shape.draft_vocab_size != shape.vocab_size,
        "a head of its own": own_head and shape.draft_vocab_size == shape.vocab_size,
        "trained embeddings": shape.train_embeddings,
        "attention sinks": shape.attention_sinks,
        "--block-attention other than by-layer": shape.causal != tuple(kind == "sliding" for kind in shape.layer_types),
    }
    if wrong := [what for what, is_so in found.items() if is_so]:
        raise CheckpointError(
            f"--engine sglang: expected a draft that proposes by the verifier's embeddings and head, found "
            f"{' and '.join(wrong)}; serve it with vLLM, or train it on a store captured with --teacher full whose "
            "draft vocabulary is the verifier's"
        )


def served_form(
    name: str,
    shape: BlockShape,
    model: nn.Module,
    state: CheckpointState,
    vocab_map: VocabMap,
    *,
    engine: str,
    dtype: torch.dtype,
) -> ServedForm:
    """Return config.json, and the tensors in `dtype`; d2t int64 [D] and t2d bool [V] where the vocabulary is reduced.

    A frozen head over the verifier's whole vocabulary is left out, unless the verifier scales its logits: a draft's
    head has its rows times that scale.
    """
    whole = shape.draft_vocab_size == shape.vocab_size
    own_head = shape.train_head or not whole or HeadForm.of(state.verifier).scale != 1.0
    left_out = set() if own_head else {"lm_head.weight"}
    config = served_config(name, shape, state, engine, str(dtype).removeprefix("torch."), own_head=own_head)
    tensors = {key: value.to(dtype).contiguous() for key, value in model.state_dict().items() if key not in left_out}
    return ServedForm(config, tensors | ({} if whole else vocab_tensors(shape, vocab_map)))


def check_served(path: Path, name: str) -> None:
    """Read an export back. Raises CheckpointError for tensors that are missing, misshapen or not finite, and for maps
    or ids that can't be.
    """
    config = read_json(path / "config.json")
    tensors = load_file(path / "model.safetensors")
    expected = _expected_shapes(config)
    whole = config["draft_vocab_size"] == config["vocab_size"]
    if whole:
        expected.pop("lm_head.weight")
    found = {key: tuple(value.shape) for key, value in tensors.items()}
    if wrong := {key: found.get(key) for key, shape in expected.items() if found.get(key) != shape}:
        raise CheckpointError(f"{path}: expected { ({key: expected[key] for key in wrong}) }, found {wrong}")
    if not whole:
        require_same_map(path, tensors)
    if config["architectures"] != [_ARCHITECTURES[name]]:
        raise CheckpointError(f"{path}: expected {_ARCHITECTURES[name]}, found {config['architectures']}")
    if not 0 <= config["mask_token_id"] < config["vocab_size"]:
        raise CheckpointError(f"{path}: expected a mask token of the vocabulary, found {config['mask_token_id']}")
    if not config["max_position_embeddings"]:
        raise CheckpointError(f"{path}: expected max_position_embeddings above 0, found none: engines need it")
    require_finite(path, tensors)


def _expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that an engine loads for this config.json, by name."""
    hidden, width = config["hidden_size"], config["head_dim"]
    queries, keys = width * config["num_attention_heads"], width * config["num_key_value_heads"]
    inner, draft = config["intermediate_size"], config["draft_vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, hidden * len(config["dflash_config"]["target_layer_ids"])),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
        "lm_head.weight": (draft, hidden),
    }
    if rank := config.get("markov_rank"):
        shapes["markov_head.markov_w1.weight"] = (config["vocab_size"], rank)
        shapes["markov_head.markov_w2.weight"] = (draft, rank)
    of_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,), "self_attn.q_norm": (width,),
        "self_attn.k_norm": (width,), "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries), "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner),
    }  # fmt: skip
    for number in range(config["num_hidden_layers"]):
        shapes |= {f"layers.{number}.{key}.weight": shape for key, shape in of_layer.items()}
        if config["dflash_config"].get("attention_sink_bias"):
            shapes[f"layers.{number}.self_attn.attention_sink_bias"] = (config["num_attention_heads"],)
    return shapes
