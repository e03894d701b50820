"""Quantised checkpoints: what transformers can load is left to it, with the packages it needs; the rest is refused.

transformers skips a quantisation that it does not know, with a warning, and reads the codes as if they were weights.
So what stands in a directory is looked at before anything is loaded: the method that config.json names, ModelOpt's
hf_quant_config.json, and the dtypes of the stored tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from draftcache.capture.verifier.weights import weight_files
from draftcache.store.common.errors import InputError
from draftcache.store.common.files import read_json

_EXTRAS = {
    "awq": ("accelerate", "gptqmodel"),
    "bitsandbytes": ("accelerate", "bitsandbytes"),
    "compressed-tensors": ("compressed_tensors",),
    "fp8": ("accelerate",),
    "gptq": ("accelerate", "gptqmodel", "optimum"),
    "mxfp4": ("accelerate",),
}
"""Per method the modules that transformers needs for it, by the names that Python imports; pip knows them too."""
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)
_CODES = ("F8_", "F4", "F6_", "E8M0", "U8", "I8", "U16", "I16", "U32", "I32")
"""Beginnings of the dtypes of safetensors that a quantised weight may have."""


def require_loadable(path: Path, config: Any) -> None:
    """Raise InputError unless transformers can load the weights of the directory `path` as what they are.

    `config` is the model's configuration, of all its parts.
    """
    named = quantisation_method(config)
    modelopt = path / "hf_quant_config.json"
    if named == "modelopt" or (named is None and modelopt.is_file()):
        raise InputError(
            f"{path}: expected weights that transformers can load, found weights quantised by ModelOpt to "
            f"{_modelopt_algorithm(config, modelopt)}, which it can't; capture the checkpoint that was quantised, or a "
            "copy with each weight multiplied by its scales, without quantization_config and hf_quant_config.json"
        )
    if named is None:
        _require_plain_files(path)
        return
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    known = {str(method) for method in AUTO_QUANTIZATION_CONFIG_MAPPING}
    if named not in known and not any(method.startswith(f"{named}_") for method in known):
        raise InputError(
            f"{path / 'config.json'}: expected a quant_method that transformers can load, found {named!r}; capture the "
            "checkpoint that was quantised, or update transformers"
        )
    missing = [module.replace("_", "-") for module in _EXTRAS.get(named, ()) if find_spec(module) is None]
    if missing:
        raise InputError(
            f"{path}: weights quantised by {named} need {' and '.join(missing)}, which Python can't find: "
            f"pip install {' '.join(missing)}"
        )


def is_quantised(model: nn.Module) -> bool:
    """Whether a loaded model computes with quantised weights. One that was dequantised when it was loaded does not."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not getattr(quantizer.quantization_config, "dequantize", False):
        return True
    return any(parameter.dtype not in _PLAIN for parameter in model.parameters())


def require_plain(name: str, module: nn.Module) -> None:
    """Raise InputError where `module`, an embedding table or a head that the model calls `name`, is quantised."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dtype not in _PLAIN:
        found = getattr(weight, "dtype", "no weight")
        raise InputError(
            f"{type(module).__name__}: expected {name} in float32, bfloat16 or float16, found {found}; a draft is "
            "trained with its rows: use a checkpoint that quantises neither embeddings nor head"
        )


def quantisation_method(config: Any) -> str | None:
    """The `quant_method` of a model's configuration; None where it names no quantisation."""
    for part in (config, config.get_text_config()):
        values = getattr(part, "quantization_config", None)
        if values is not None:
            values = values if isinstance(values, Mapping) else values.to_dict()
            method = values.get("quant_method", "no method")
            return str(getattr(method, "value", method))
    return None


def _modelopt_algorithm(config: Any, path: Path) -> str:
    values = getattr(config, "quantization_config", None) or {}
    stored = read_json(path).get("quantization", {}) if path.is_file() else {}
    return str(dict(values).get("quant_algo") or stored.get("quant_algo") or "another format")


def _require_plain_files(path: Path) -> None:
    """Raise InputError where a matrix is stored as codes, though nothing says how it was quantised."""
    for file in weight_files(path):
        for name, dtype, rank in _tensors(file):
            if rank > 1 and name.endswith("weight") and dtype.startswith(_CODES):
                raise InputError(
                    f"{file}: expected weights in floating point, as config.json names no quantisation, found {name} "
                    f"in {dtype}: restore quantization_config in config.json, or use a checkpoint that is not quantised"
                )


def _tensors(file: Path) -> Iterator[tuple[str, str, int]]:
    """Name, dtype and number of dimensions of every tensor; none of a damaged file, which loading will name."""
    with suppress(SafetensorError, OSError), safe_open(file, framework="np") as tensors:
        for name in tensors.keys():  # noqa: SIM118  (no mapping)
            part = tensors.get_slice(name)
            yield name, str(part.get_dtype()), len(part.get_shape())
