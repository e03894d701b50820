"""Bit patterns of bfloat16 in numpy, which has no such dtype: states are stored as uint16."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray


def bf16_to_float32(bits: NDArray[Any]) -> NDArray[np.float32]:
    """Return the values of bf16 bit patterns (uint16, any shape) as float32, exactly."""
    values: NDArray[np.float32] = np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)
    return values


def float32_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the bf16 bit patterns of float32 values (any shape), rounded to nearest, ties to even."""
    bits: NDArray[np.uint16] = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    return bits


def states_to_float32(states: NDArray[Any]) -> NDArray[np.float32]:
    """Return states, which are float32 or bf16 bit patterns (uint16), as float32. Float32 is not copied."""
    return states if states.dtype == np.float32 else bf16_to_float32(states)
