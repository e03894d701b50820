"""Reading one tensor of frozen.safetensors with numpy, which has no bf16, without reading the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.codecs import bf16_to_float32
from store.errors import StoreError

_STORED = {"BF16": "<u2", "F16": "<f2", "F32": "<f4"}


def frozen_tensor(path: Path, name: str) -> NDArray[np.float32]:
    """A floating-point tensor as float32, exactly. Raises StoreError where the file holds none of this name."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    about = header.get(name)
    if about is None or about["dtype"] not in _STORED:
        raise StoreError(f"{path}: expected a float tensor {name}, found {sorted(header.keys() - {'__metadata__'})}")
    first = 8 + size + int(about["data_offsets"][0])
    stored = np.memmap(path, _STORED[about["dtype"]], "r", offset=first, shape=tuple(about["shape"]))
    if about["dtype"] == "BF16":
        return bf16_to_float32(np.asarray(stored))
    return np.asarray(stored, np.float32)
