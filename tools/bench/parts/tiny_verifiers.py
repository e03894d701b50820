"""Tiny random models of every causal-LM type that the installed transformers knows, saved as model directories.

A type's default configuration is shrunk by the names of its fields (`SIZES`): widths, heads, layers, experts,
positions, windows and token ids, in nested configurations too. Per-layer lists keep layers that show every value that
the lists hold, so that a hybrid of four layers still has every kind of layer. `tiny_overrides` has what the names do
not say. Weights are drawn wide enough that every layer changes the states visibly, and norms and biases differ from
ones and zeros: a check could not notice that a neutral weight is left out.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from draftcache.tools.bench.parts.tiny_overrides import LISTED, OVERRIDES, UNBUILDABLE

VOCAB = 256
"""Token ids of every tiny model. Ids below 8 and from 240 on are special; conversations use those between."""
LAYERS = 4
POSITIONS = 512
_FIRST_SPECIAL = 240

SIZES: tuple[tuple[str, int], ...] = (
    (r"(n_shared_experts|num_shared_experts|moe_num_shared_experts|zero_expert_num|topk_group|n_group)", 1),
    (r"(num_expert_group|n_groups|mamba_ngroups|mamba_n_groups|first_k_dense_replace|num_dense_layers)", 1),
    (r"(num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|top_k_experts)", 2),
    (r"(num_local_experts|num_experts|n_routed_experts|moe_num_experts)", 4),
    (r"(mamba_num_heads|mamba_n_heads|n_mamba_heads)", 8),
    (r"(mamba_expand|expand)", 2),
    (r"qk_rope_head_dim", 16),  # the rotary embedding of such models has the width `head_dim`
    (r"rotary_dim", 8),
    (r"qk_head_dim", 32),
    (r"(.*head_dim|d_head|.*headdim|.*d_head|attention_head_size|kv_channels|dim_head|d_kv)", 16),
    (r".*(num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups)", 2),
    (r"index_n_heads", 32),  # with few heads, scores of sparse attention are often 0 and tie
    (r"(.*_)?(num_|n_)?(attention_|key_|value_)?heads?", 4),
    (r"(linear_num_value_heads|linear_num_key_heads|linear_num_heads|n_head)", 4),
    (r"(kv_lora_rank|q_lora_rank)", 32),
    (r".*(_rank|d_rel)", 16),
    (r"(hidden_size|d_model|n_embd|embed_dim|emb_dim|word_embed_proj_dim|lru_width|backbone_hidden_size)", 64),
    (r"(out_hidden_size|text_embed_dim|conv_dim|input_embedding_size|embedding_dim)", 64),
    (r"adapter_(in|out|input)_(dim|size)", 64),
    (r"(hidden_size_per_layer_input|router_hidden_size|embedding_size)", 32),
    (r".*(moe_|expert).*intermediate_size", 48),
    (r".*(intermediate_size|intermediate_size_mlp|ffn_dim|ffn_hidden_size|d_ff|dff|dim_ff|n_inner|d_inner)", 128),
    (r"(dense_intermediate_size|mamba_d_ssm|block_ffn_dim|attention_hidden_size)", 128),
    (r"num_layers_per_stack", LAYERS // 2),
    (r"(num_hidden_layers|n_layers?|num_layers|.*_layers|num_blocks|depth)", LAYERS),
    (r"(mamba_d_state|state_size|ssm_state_size)", 16),
    (r"(time_step_rank|mamba_dt_rank)", 4),
    (r"index_topk", 32),
    (r".*chunk_size", 16),
    (r"(.*sliding_window(_size)?|attention_window_size|local_attention|window_size|local_attention_window_len)", 32),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_target_positions)", POSITIONS),
    (r"(original_max_position_embeddings|model_max_length|rel_extent|seq_length)", POSITIONS),
    (r"(max_source_positions|max_sequence_length)", 64),
    (r"(.*vocab_size.*|vocab_offset)", VOCAB),
)
"""Sizes by the whole name of a field; the first pattern that matches counts. Larger values only are replaced."""

_INDEX_LISTS = r".*(_ids|_idxs|_indices|_layers|_indexes|layer_idx)"
"""Names of lists that hold numbers of layers."""
_EXEMPT = r"(chunk_size_feed_forward|chunk_size_lm_head|num_kv_shared_layers|num_nextn_predict_layers|num_mtp_layers)"
_LEFT_OUT = {"num_kv_shared_layers": 0, "num_nextn_predict_layers": 0, "num_mtp_layers": 0}
"""Numbers of extra layers, which need more depth than a tiny model has."""
_INITIALIZERS = r"(initializer_range|init_std|embed_init_std|initializer_factor)"
_CAPS = r"(.*logits?_soft_?cap(ping)?|qk_l2_clip_threshold|gate_soft_cap)"
_NEUTRAL = r"(.*_multiplier|logits_scaling|logit_scale)"


class UnbuildableError(Exception):
    """Raised where a type has no tiny model here, with the reason."""


def model_types() -> list[str]:
    """Return every model type with a causal LM in the installed transformers, in alphabetical order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def family_of(model_type: str) -> str:
    """Return the folder of transformers.models that has the code of a type."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    try:
        from transformers import models

        module = getattr(models, model_type_to_module_name(model_type))
        return str(module.__name__.rpartition(".")[2])
    except (AttributeError, ImportError):
        return str(name)


def tiny_config(model_type: str) -> Any:
    """Return the shrunk configuration of a type. Raises UnbuildableError where there is none."""
    if model_type in UNBUILDABLE:
        raise UnbuildableError(UNBUILDABLE[model_type])
    config_class = CONFIG_MAPPING[model_type]
    overrides = dict(OVERRIDES.get(model_type, {}))
    try:
        values = config_class(**overrides.pop("start", {})).to_dict()
        shrunk = _shrunk(values, overrides)
        return config_class(**{key: value for key, value in shrunk.items() if key not in _FILLED_IN})
    except Exception as exc:
        raise UnbuildableError(f"config: {type(exc).__name__}: {' '.join(str(exc).split())}") from exc


_FILLED_IN = {"model_type", "transformers_version", "architectures", "_name_or_path", "dtype", "torch_dtype"}


def save_tiny_model(model_type: str, path: Path) -> Any:
    """Write the directory of a type's tiny random model, float32 safetensors, and return its configuration.

    Raises UnbuildableError where the model can't be built or its logits are not finite.
    """
    config = tiny_config(model_type)
    torch.manual_seed(0)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        spread_weights(model)
        logits = _logits(model)
        model.save_pretrained(path)
    except Exception as exc:
        raise UnbuildableError(f"model: {type(exc).__name__}: {' '.join(str(exc).split())}") from exc
    if not bool(torch.isfinite(logits).all()):
        raise UnbuildableError("model: its logits are not finite")
    try:
        again = _logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval())
    except Exception as exc:
        problem = f"{type(exc).__name__}: {' '.join(str(exc).split())}"
        raise UnbuildableError(f"transformers can't load what it saved: {problem}") from exc
    if not torch.allclose(logits, again, rtol=1e-3, atol=1e-3):
        difference = float((logits - again).abs().max())
        raise UnbuildableError(f"transformers loads another model than it saved: logits differ by {difference:.3g}")
    return config


@torch.no_grad()
def spread_weights(model: nn.Module) -> None:
    """Make random weights wide enough to matter, and take norms and biases away from ones and zeros, in place."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() < 2:
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.add_(0.1 * noise)
        elif float(parameter.std()) < 0.05:
            parameter.copy_(0.1 * noise)


def _logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ids = torch.arange(8, 8 + 96)[None]
        logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _shrunk(values: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The values of one configuration, shrunk by name, its per-layer lists included; `overrides` count last.

    Encoders of images and sound get another depth than the text model, as they have it in checkpoints.
    """
    depth = next((values[name] for name in LISTED if isinstance(values.get(name), int)), None)
    kept = _kept_layers(values, depth, overrides)
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name == "per_layer_config" and kept is not None:
            found[name] = _per_layer(value, kept)
        elif isinstance(value, dict) and name not in ("id2label", "label2id"):
            inner = overrides.get(name, {})
            towers = {key: 2 for key in LISTED if key in value and re.search("vision|audio", name)}
            found[name] = _shrunk(value, towers | inner if isinstance(inner, dict) else towers)
        elif isinstance(value, list | tuple):
            found[name] = _shrunk_list(name, list(value), depth, kept)
        else:
            found[name] = _shrunk_value(name, value)
    if kept is not None:
        found.update({name: len(kept) for name in LISTED if isinstance(found.get(name), int)})
    if "kv_lora_rank" in found and "num_attention_heads" in found:
        found["num_key_value_heads"] = found["num_attention_heads"]  # latent attention has one latent for all heads
    found.update({name: value for name, value in overrides.items() if not isinstance(found.get(name), dict)})
    if found.get("is_decoder") is False and not found.get("is_encoder_decoder"):
        found["is_decoder"] = True  # as in a checkpoint that is a causal LM
    return found


def _shrunk_value(name: str, value: Any) -> Any:
    if name == "head_dim" and value is None:
        return 16  # some classes leave it to the checkpoint
    if name in _LEFT_OUT:
        return value if value is None else _LEFT_OUT[name]
    if isinstance(value, float) and re.fullmatch(_INITIALIZERS, name):
        return 0.1 if value < 0.1 else value
    if isinstance(value, float) and re.fullmatch(_CAPS, name):
        return min(value, 3.0)  # small logits would not reach the cap of a trained model
    if isinstance(value, float) and value == 1.0 and re.fullmatch(_NEUTRAL, name):
        return 0.5  # a factor of 1 that is left out would not be noticed
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if re.fullmatch(r".*_(token_id|token_index|id|index)", name):
        return _token_id(name, value)
    if re.fullmatch(_EXEMPT, name):
        return value
    size = next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)
    return value if size is None else min(value, size)


def _token_id(name: str, value: int) -> int:
    """A special token's id below VOCAB, told by its name where the old one is above; other numbers as they are."""
    if value < 8:
        return value
    known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return known.get(name, _FIRST_SPECIAL + sum(name.encode()) % (VOCAB - _FIRST_SPECIAL))


def _shrunk_list(name: str, value: list[Any], depth: int | None, kept: Sequence[int] | None) -> list[Any]:
    if "token_id" in name:
        return [_token_id(name, item) if isinstance(item, int) else item for item in value]
    if kept is not None and depth == len(value):
        return [_shrunk_value(_singular(name), value[layer]) for layer in kept]
    if re.fullmatch(_INDEX_LISTS, name) and kept is not None and all(type(item) is int for item in value):
        return [new for new, old in enumerate(kept) if old in value]
    return value


def _per_layer(values: Mapping[Any, Any] | None, kept: Sequence[int]) -> dict[int, Any] | None:
    """Values of single layers, by their numbers."""
    if values is None:
        return None
    by_layer = {int(layer): value for layer, value in values.items()}
    return {new: _shrunk(by_layer[old], {}) for new, old in enumerate(kept) if old in by_layer}


def _singular(name: str) -> str:
    """The name whose rule counts for the entries of a per-layer list."""
    return name.removesuffix("_per_layer")


def _kept_layers(values: Mapping[str, Any], depth: int | None, overrides: Mapping[str, Any]) -> list[int] | None:
    """Numbers of the layers that a tiny model keeps, ascending: the first, and first ones of every kind of layer."""
    if depth is None:
        return None
    wanted = next((overrides[name] for name in LISTED if name in overrides), min(LAYERS, depth))
    kinds: list[tuple[str, ...]] = []
    for layer in range(depth):
        kinds.append(tuple(_kinds(values, depth, layer)))
    seen: set[str] = set()
    kept: list[int] = []
    for layer, kind in enumerate(kinds):
        if len(kept) < wanted and not set(kind) <= seen:
            kept.append(layer)
            seen |= set(kind)
    for layer in range(depth):
        if len(kept) < min(wanted, depth) and layer not in kept:
            kept.append(layer)
    kept += list(range(depth, depth + wanted - len(kept)))
    return sorted(kept) if all(layer < depth for layer in kept) else None


def _kinds(values: Mapping[str, Any], depth: int, layer: int) -> Iterator[str]:
    """What the per-layer lists of a configuration say of one layer."""
    for name, value in values.items():
        if not isinstance(value, list | tuple):
            continue
        if len(value) == depth and not re.fullmatch(_INDEX_LISTS, name):
            yield f"{name}={value[layer]}"
        elif re.fullmatch(_INDEX_LISTS, name) and all(type(item) is int for item in value):
            yield f"{name}={layer in value}"
