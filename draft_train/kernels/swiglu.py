"""SwiGLU over rows that hold gate and up side by side, and its gradients.

Shape suffixes: T rows, I intermediate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from draftcache.store.common.triton_launch import jit, runs_kernels, tl

_BLOCK = 1024


def swiglu(gate_up: Tensor) -> Tensor:
    """Return `silu(gate) * up` [T, I] of `gate_up` [T, 2I], gate first, computed in float32 and rounded once."""
    if not runs_kernels(gate_up):
        return swiglu_reference(gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    if rows:
        _swiglu_kernel[(rows, -(-width // _BLOCK))](gate_up, out, width, BLOCK=_BLOCK)
    return out


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """Plain twin of `swiglu`. It computes in float64 if `gate_up` is float64."""
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


def swiglu_backward_(upstream: Tensor, gate_up: Tensor) -> Tensor:
    """Overwrite `gate_up` [T, 2I] with its gradient and `upstream` [T, I] with `swiglu(gate_up)`; return the latter.

    The weights' gradients need both results next. They take the memory of the operands because these two tensors are
    the largest of a training step.
    """
    if not runs_kernels(gate_up):
        return swiglu_backward_reference_(upstream, gate_up)
    rows, width = upstream.shape
    if rows:
        _swiglu_gradient_kernel[(rows, -(-width // _BLOCK))](upstream, gate_up, width, BLOCK=_BLOCK)
    return upstream


def swiglu_backward_reference_(upstream: Tensor, gate_up: Tensor) -> Tensor:
    """Plain twin of `swiglu_backward_`. It computes in float64 if `gate_up` is float64."""
    dtype = torch.promote_types(gate_up.dtype, torch.float32)
    given, (gate, up) = upstream.to(dtype), gate_up.to(dtype).chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    activation = gate * sigmoid * up
    gate_up.copy_(torch.cat((given * up * sigmoid * (1 + gate * (1 - sigmoid)), given * gate * sigmoid), dim=-1))
    return upstream.copy_(activation)


@jit
def _swiglu_kernel(gate_up, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up + row * 2 * width + columns, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + columns, mask=inside).to(tl.float32)
    tl.store(out + row * width + columns, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), mask=inside)


@jit
def _swiglu_gradient_kernel(upstream, gate_up, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    pointer = gate_up + row * 2 * width + columns
    dtype = gate_up.dtype.element_ty
    given = tl.load(upstream + row * width + columns, mask=inside).to(tl.float32)
    gate = tl.load(pointer, mask=inside).to(tl.float32)
    up = tl.load(pointer + width, mask=inside).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    tl.store(pointer, (given * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))).to(dtype), mask=inside)
    tl.store(pointer + width, (given * silu).to(dtype), mask=inside)
    tl.store(upstream + row * width + columns, (silu * up).to(dtype), mask=inside)
