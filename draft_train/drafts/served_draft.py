"""A draft's directory as an engine finds it: config.json, the headers of its safetensors files, and what is wrong.

Nothing but headers and small tensors is read, so that a check takes no longer for a large draft. This module imports no
torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from draftcache.draft_train.drafts.serving_target import ServingTarget, VerifierFacts
from draftcache.store.common.errors import DraftcacheError, InputError
from draftcache.store.common.files import read_json

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Finding:
    """Something about a draft that an engine would not report, or would report without saying what to do."""

    level: str
    """"error" where the draft is served wrongly or not at all, "warning" where that depends on what is not known."""
    trap: str
    """Name of what was looked for."""
    where: str
    """The field or the tensor."""
    expected: str
    found: str
    advice: str
    """What to do."""

    def __str__(self) -> str:
        return f"{self.where}: expected {self.expected}, found {self.found}; {self.advice}"


def error(trap: str, where: str, expected: str, found: object, advice: str) -> Finding:
    """Return a finding that is an error."""
    return Finding("error", trap, where, expected, str(found), advice)


def warning(trap: str, where: str, expected: str, found: object, advice: str) -> Finding:
    """Return a finding that is a warning."""
    return Finding("warning", trap, where, expected, str(found), advice)


class TensorHeader(NamedTuple):
    """What a safetensors file says of a tensor without its values."""

    shape: tuple[int, ...]
    dtype: str
    """In the words of safetensors: BF16, F16, F32, I64, BOOL."""
    file: Path


@dataclass(frozen=True)
class ServedDraft:
    """What an engine loads, and for which one it is looked at."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorHeader]
    target: ServingTarget
    verifier: VerifierFacts

    @classmethod
    def read(cls, path: Path, target: ServingTarget, verifier: VerifierFacts) -> ServedDraft:
        """Read a directory. Raises InputError where it has no config.json, or a file is none of safetensors."""
        return cls(path, read_config(path), _headers(path), target, verifier)

    @cached_property
    def speculators(self) -> bool:
        """Whether this is the speculators form."""
        return "speculators_model_type" in self.config

    @cached_property
    def layer(self) -> dict[str, Any]:
        """The fields of the draft's layers: all of config.json, or in the speculators form what is inside."""
        inner = self.config.get("transformer_layer_config") if self.speculators else self.config
        return inner if isinstance(inner, dict) else {}

    @cached_property
    def nested(self) -> dict[str, Any]:
        """The fields of `dflash_config`, which in the speculators form only the layer can have."""
        found = self.layer.get("dflash_config")
        return found if isinstance(found, dict) else {}

    @property
    def quantized(self) -> bool:
        """Whether its weights are in the form of a quantisation, whose names and shapes are not known here."""
        return bool(self.config.get("quantization_config") or self.layer.get("quantization_config"))

    @property
    def vocab_size(self) -> int | None:
        """Token ids of the verifier, as the draft has it."""
        return _number(self.layer.get("vocab_size"))

    @property
    def draft_vocab_size(self) -> int | None:
        """Ids that the draft proposes, which engines take for the verifier's where none is named."""
        return _number(self.config.get("draft_vocab_size")) or self.vocab_size

    @property
    def blocks(self) -> list[int] | None:
        """The blocks, counted from 0, whose outputs the draft reads, where the exporter wrote them down."""
        return whole_numbers(self.config.get("target_hidden_state_indices"))

    def ours(self, name: str) -> Any:
        """Return what draftcache wrote of the export under this name; None in a draft of somebody else."""
        found = self.config.get("draftcache")
        return found.get(name) if isinstance(found, dict) else None

    def array(self, name: str) -> NDArray[Any]:
        """Return the values of a small tensor of whole numbers or truth values."""
        with safe_open(self.tensors[name].file, framework="numpy") as file:
            return np.asarray(file.get_tensor(name))


def read_config(path: Path) -> dict[str, Any]:
    """Return config.json of a draft's directory. Raises InputError where there is none."""
    try:
        config = read_json(path / CONFIG)
    except (DraftcacheError, OSError, ValueError) as exc:
        raise InputError(f"{path}: expected a draft's directory with {CONFIG} ({exc}); give the one to serve") from exc
    if not isinstance(config, dict):
        raise InputError(f"{path / CONFIG}: expected a JSON object, found {type(config).__name__}")
    return config


def whole_numbers(value: Any) -> list[int] | None:
    """Return the value if it is a list of whole numbers with at least one, None otherwise."""
    if isinstance(value, list | tuple) and value and all(type(item) is int for item in value):
        return list(value)
    return None


def _number(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _headers(path: Path) -> dict[str, TensorHeader]:
    names = [WEIGHTS]
    if not (path / WEIGHTS).is_file() and (path / _INDEX).is_file():
        weight_map = read_json(path / _INDEX).get("weight_map", {})
        names = sorted({Path(str(name)).name for name in weight_map.values()})
    found: dict[str, TensorHeader] = {}
    for file in (path / name for name in names if (path / name).is_file()):
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # it is no mapping
                    part = tensors.get_slice(name)
                    found[name] = TensorHeader(tuple(part.get_shape()), str(part.get_dtype()), file)
        except (SafetensorError, OSError) as exc:
            raise InputError(f"{file}: expected a safetensors file, could not read it ({exc}); copy it again") from exc
    return found
