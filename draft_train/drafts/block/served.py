"""The form in which engines load a block draft: config.json and model.safetensors, classic or of speculators.

vLLM loads DSpark as `Qwen3DSparkModel` and DFlash as `DFlashDraftModel`, both of model type qwen3 (vLLM 0.26 to 0.32).
It takes the width of `fc` and the taps from `dflash_config.target_layer_ids`, where ids are those of block outputs. A
layer that slides is causal and a full one is not, unless `dflash_config.causal` says so for all. Missing embeddings
are the verifier's; so is a missing head, if the draft vocabulary is the verifier's. SGLang's DFlash worker always uses
the verifier's embeddings and head, so it serves only drafts that have none of their own, in bfloat16. It reads RoPE's
base since 0.5.13 and which layers slide since 0.5.14.
From the speculators form vLLM makes one `causal` for all layers of DFlash, and none for DSpark; before 0.27 it takes
the anchor of DSpark for one that predicts nothing, whatever is written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from draftcache.draft_train.drafts.block.shape import BlockShape
from draftcache.draft_train.drafts.protocol import CheckpointState, ServedForm
from draftcache.draft_train.drafts.served_parts import block_numbers, common_config, vocab_tensors
from draftcache.draft_train.drafts.serving_target import ServingTarget, sglang_dflash_needs
from draftcache.draft_train.drafts.speculators_form import speculators_config
from draftcache.store.common.errors import CheckpointError, InputError
from draftcache.store.format.head_form import HeadForm
from draftcache.store.format.vocab_map import VocabMap

ENGINES = {"dflash": ("vllm", "sglang"), "dspark": ("vllm",)}
"""By architecture, the engines that load it."""
ARCHITECTURES = {"dflash": "DFlashDraftModel", "dspark": "Qwen3DSparkModel"}
"""By architecture, what vLLM calls it."""
ANCHOR_FIELD_SINCE = "0.27.0"
"""The version of vLLM from which on the speculators form says whether the anchor predicts."""
_SPECULATORS = {"dflash": "DFlashSpeculator", "dspark": "DSparkSpeculator"}
_TYPES = {"sliding": "sliding_attention", "full": "full_attention"}


def served_config(
    name: str, shape: BlockShape, state: CheckpointState, target: ServingTarget, dtype: str, *, own_head: bool
) -> dict[str, Any]:
    """Return config.json of the exported draft `name`. `dtype` is the name of its weights' dtype.

    `own_head` says whether the weights hold a head. Raises CheckpointError for what the engine can't load, InputError
    where its version decides and is not known.
    """
    ids = block_numbers(state)
    if shape.mask_token_id < 0:
        raise CheckpointError("expected a mask token, found none")
    if target.engine == "sglang":
        _require_sglang(shape, own_head, target, dtype)
    of_block = {"mask_token_id": shape.mask_token_id, "target_layer_ids": ids, "block_size": shape.block_size}
    if shape.causal != _by_layer(shape):
        of_block["causal"] = all(shape.causal)
    if shape.attention_sinks:
        of_block["attention_sink_bias"] = True
    config = common_config(shape, state, target, dtype) | {
        "architectures": [ARCHITECTURES[name]],
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
    return config if target.form == "classic" else _speculators_config(name, shape, state, target, config, ids)


def _speculators_config(
    name: str, shape: BlockShape, state: CheckpointState, target: ServingTarget, classic: dict[str, Any], ids: list[int]
) -> dict[str, Any]:
    """Return config.json in the speculators form. Raises as `served_config` does."""
    _require_speculators(name, shape, target)
    fields: dict[str, Any] = {
        "architectures": [_SPECULATORS[name]],
        "block_size": shape.block_size,
        "mask_token_id": shape.mask_token_id,
        "aux_hidden_state_layer_ids": [block + 1 for block in ids],
        # speculators says so of sliding layers only, vLLM's DFlash of all, where it may be left out as true.
        "sliding_window_non_causal": not any(shape.causal),
        "sample_from_anchor": not shape.bonus_anchor,
    }
    if name == "dspark":
        confident = shape.confidence_head
        fields |= {"markov_rank": shape.markov_rank, "markov_head_type": "vanilla"}
        fields |= {"enable_confidence_head": confident, "confidence_head_with_markov": confident}
    config = speculators_config(classic, name, state, target, tokens=shape.steps, **fields)
    if name == "dspark":  # vLLM 0.26 takes the width of fc from there, which it writes for DFlash only
        config["transformer_layer_config"]["dflash_config"] = {"target_layer_ids": ids}
    return config


def _require_speculators(name: str, shape: BlockShape, target: ServingTarget) -> None:
    """Raise CheckpointError for what the speculators form can't say, InputError where the version of vLLM decides."""
    same = len(set(shape.causal)) == 1 and (not shape.causal[0] or shape.causal == _by_layer(shape))
    says = shape.causal == _by_layer(shape) if name == "dspark" else same
    found = {
        "attention sinks": shape.attention_sinks,
        f"the block attention {list(shape.causal)} in layers {list(shape.layer_types)}": not says,
        "trained embeddings": shape.train_embeddings,
    }
    if wrong := [what for what, is_so in found.items() if is_so]:
        raise CheckpointError(
            f"--format speculators: expected a draft that this form can describe, found {' and '.join(wrong)}; use "
            "--format classic"
        )
    if name == "dspark" and not shape.bonus_anchor and not target.since(ANCHOR_FIELD_SINCE):
        known = "none" if target.version is None else target.version
        raise InputError(
            f"--engine-version: expected {ANCHOR_FIELD_SINCE} or later for a DSpark draft whose anchor predicts, found "
            f"{known}: vLLM 0.26.0 takes the anchor of the speculators form for one that predicts nothing; name a "
            f"version from {ANCHOR_FIELD_SINCE} on, or use --format classic, which older ones read too"
        )


def _by_layer(shape: BlockShape) -> tuple[bool, ...]:
    """Return for each layer whether its slots are causal where nothing says otherwise: those of sliding layers are."""
    return tuple(kind == "sliding" for kind in shape.layer_types)


def _require_sglang(shape: BlockShape, own_head: bool, target: ServingTarget, dtype: str) -> None:
    """Raise CheckpointError for what SGLang's DFlash worker does not load, InputError where its version decides."""
    found = {
        "a draft vocabulary smaller than the verifier's": shape.draft_vocab_size != shape.vocab_size,
        "a head of its own": own_head and shape.draft_vocab_size == shape.vocab_size,
        "trained embeddings": shape.train_embeddings,
        "attention sinks": shape.attention_sinks,
        "--block-attention other than by-layer": shape.causal != _by_layer(shape),
    }
    if wrong := [what for what, is_so in found.items() if is_so]:
        raise CheckpointError(
            f"--engine sglang: expected a draft that proposes by the verifier's embeddings and head, found "
            f"{' and '.join(wrong)}; serve it with vLLM, or train it on a store captured with --teacher full whose "
            "draft vocabulary is the verifier's"
        )
    if dtype != "bfloat16":
        raise InputError(
            "--dtype: expected bfloat16 for a DFlash draft in SGLang, which hands it embeddings in bfloat16, found "
            f"{dtype}"
        )
    for name, (since, earlier) in sglang_dflash_needs("sliding" in shape.layer_types, shape.rope_theta).items():
        if not target.since(since):
            raise InputError(
                f"--engine-version: expected {since} or later of SGLang, which reads {name} of a DFlash draft, found "
                f"{target.version or 'none'}: {earlier} without a word; name the version"
            )


def served_form(
    name: str,
    shape: BlockShape,
    model: nn.Module,
    state: CheckpointState,
    vocab_map: VocabMap,
    *,
    target: ServingTarget,
    dtype: torch.dtype,
) -> ServedForm:
    """Return config.json, and the tensors in `dtype`; d2t int64 [D] and t2d bool [V] where the vocabulary is reduced.

    A frozen head over the verifier's whole vocabulary is left out, unless the verifier scales its logits: a draft's
    head has its rows times that scale.
    """
    whole = shape.draft_vocab_size == shape.vocab_size
    own_head = shape.train_head or not whole or HeadForm.of(state.verifier).scale != 1.0
    left_out = set() if own_head else {"lm_head.weight"}
    config = served_config(name, shape, state, target, str(dtype).removeprefix("torch."), own_head=own_head)
    tensors = {key: value.to(dtype).contiguous() for key, value in model.state_dict().items() if key not in left_out}
    return ServedForm(config, tensors | ({} if whole else vocab_tensors(shape, vocab_map)))
