"""Triton where it is installed. Without it the kernels stay plain functions that nothing calls.

Here because capture and draft_train both need it and neither may import the other; it needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = None
    tl = None

__all__ = ["jit", "power_of_two", "tl"]


def jit(kernel: Callable[..., Any] | None = None, *, varying: tuple[str, ...] = ()) -> Any:
    """`triton.jit`, or the function itself. No variant is compiled for values of the `varying` integer arguments."""
    if kernel is None:
        return lambda function: jit(function, varying=varying)
    return kernel if triton is None else triton.jit(kernel, do_not_specialize=list(varying))


def power_of_two(value: int) -> int:
    """The lowest power of two that is not below `value`, which is at least 1."""
    return 1 << (value - 1).bit_length()
