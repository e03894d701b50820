"""Triton where it is installed. Without it the kernels stay plain functions that nothing calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = None
    tl = None

__all__ = ["jit", "tl"]


def jit(kernel: Callable[..., None]) -> Any:
    """`triton.jit`, or the function itself."""
    return kernel if triton is None else triton.jit(kernel)
