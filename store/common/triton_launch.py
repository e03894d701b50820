"""Triton where it is installed. Without it the kernels stay plain functions that nothing calls.

Under TRITON_INTERPRET=1, which Triton reads when it is imported, kernels run on the CPU, slowly, through numpy. This is
how they are tested where there is no GPU.

The module is here because capture and draft_train both need it and neither may import the other. It needs no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

try:
    import triton
    from triton import language as tl
except ImportError:
    triton = None
    tl = None

__all__ = ["INTERPRETED", "jit", "power_of_two", "runs_kernels", "tl"]

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"


def runs_kernels(tensor: Any) -> bool:
    """Return whether kernels take this torch tensor. Otherwise their plain twins do."""
    return INTERPRETED or bool(tensor.is_cuda)


def jit(kernel: Callable[..., Any] | None = None, *, varying: tuple[str, ...] = ()) -> Any:
    """Return `triton.jit` of a kernel, or the kernel itself where Triton is missing.

    No variant is compiled for special values of the integer arguments that `varying` names.
    """
    if kernel is None:
        return lambda function: jit(function, varying=varying)
    return kernel if triton is None else triton.jit(kernel, do_not_specialize=list(varying))


def power_of_two(value: int) -> int:
    """Return the lowest power of two that is not below `value`, which is at least 1."""
    return 1 << (value - 1).bit_length()
