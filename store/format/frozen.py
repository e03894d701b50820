"""Reading one tensor of frozen.safetensors without torch, and without reading the others."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes  # noqa: F401  (makes numpy, and with it safetensors, know bfloat16)
import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from draftcache.store.common.errors import StoreError

_STORED = ("BF16", "F16", "F32")


def frozen_tensor(path: Path, name: str) -> NDArray[np.float32]:
    """A floating-point tensor as float32, exactly. Raises StoreError where the file holds none of this name."""
    with safe_open(path, framework="np") as tensors:
        names = list(tensors.keys())
        if name not in names or tensors.get_slice(name).get_dtype() not in _STORED:
            raise StoreError(f"{path}: expected a float tensor {name}, found {sorted(names)}")
        return np.asarray(tensors.get_tensor(name), np.float32)
