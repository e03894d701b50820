"""RMS norm and its gradients.

Shape suffixes: H hidden, P rows of the input, T rows of the output. `kept` [T] int64 names the T input rows that are
normalized, each once; with `kept` None these are all P rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftcache.store.common.triton_launch import jit, power_of_two, runs_kernels, tl

_PROGRAMS = 264
"""Most programs of a backward pass. Each takes a share of the rows and sums the weight's gradient over them."""


def rms_norm(x: Tensor, weight: Tensor, eps: float, kept: Tensor | None = None) -> Tensor:
    """Return `weight * x / sqrt(mean(x^2) + eps)` [T, H] in x's dtype, computed in float32 and rounded once.

    x [P, H] contiguous, weight [H].
    """
    if not runs_kernels(x):
        return rms_norm_reference(x, weight, eps, kept)
    rows, width = x.shape[0] if kept is None else kept.shape[0], x.shape[1]
    out = x.new_empty(rows, width)
    if rows:
        _rms_norm_kernel[(rows,)](
            x, weight, x if kept is None else kept, out, width, eps,
            CHOOSE=kept is not None, BLOCK=power_of_two(width), num_warps=8,
        )  # fmt: skip
    return out


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, kept: Tensor | None = None) -> Tensor:
    """Plain twin of `rms_norm`. It computes in float64 if x is float64."""
    values = (x if kept is None else x[kept]).to(torch.promote_types(x.dtype, torch.float32))
    return (weight * (values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps))).to(x.dtype)


def rms_norm_backward(
    upstream: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    weight_gradient: Tensor,
    residual: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """Return the gradient [P, H] of x, plus `residual` [T, H] if given; add the weight's to `weight_gradient` [H].

    `upstream` [T, H] is the gradient of the output. Rows that are not kept have gradient 0. With r = 1 / rms(x) and
    g = upstream * weight, the gradient of a row is `r (g - x r^2 mean(g x))`.
    """
    if not runs_kernels(x):
        return rms_norm_backward_reference(upstream, x, weight, eps, weight_gradient, residual, kept)
    rows, width = upstream.shape
    out = torch.empty_like(x) if kept is None else torch.zeros_like(x)
    if not rows:
        return out
    programs = min(rows, _PROGRAMS)
    partial = torch.empty(programs, width, device=x.device, dtype=torch.float32)
    _rms_norm_gradient_kernel[(programs,)](
        upstream, x, weight, upstream if residual is None else residual, x if kept is None else kept, out, partial,
        rows, width, eps, ADD=residual is not None, CHOOSE=kept is not None, BLOCK=power_of_two(width), num_warps=8,
    )  # fmt: skip
    weight_gradient += partial.sum(0)
    return out


def rms_norm_backward_reference(
    upstream: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    weight_gradient: Tensor,
    residual: Tensor | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """Plain twin of `rms_norm_backward`. It computes in float64 if x is float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    values, given = (x if kept is None else x[kept]).to(dtype), upstream.to(dtype)
    scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    normed, weighted = values * scale, given * weight
    weight_gradient += (given * normed).sum(0)
    gradient = scale * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    gradient = (gradient if residual is None else gradient + residual.to(dtype)).to(x.dtype)
    return gradient if kept is None else torch.zeros_like(x).index_copy_(0, kept, gradient)


@jit
def _rms_norm_kernel(x, weight, kept, out, width, eps, CHOOSE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = row * width
    x_start = start
    if CHOOSE:
        x_start = tl.load(kept + row) * width
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + x_start + columns, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 0) / width + eps)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start + columns, (factor * (values * scale)).to(out.dtype.element_ty), mask=inside)


@jit(varying=("rows",))
def _rms_norm_gradient_kernel(
    upstream, x, weight, residual, kept, out, partial, rows, width, eps,
    ADD: tl.constexpr, CHOOSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for row in range(program, rows, programs):
        start = tl.cast(row, tl.int64) * width
        x_start = start
        if CHOOSE:
            x_start = tl.load(kept + row) * width
        values = tl.load(x + x_start + columns, mask=inside, other=0.0).to(tl.float32)
        given = tl.load(upstream + start + columns, mask=inside, other=0.0).to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(values * values, 0) / width + eps)
        normed = values * scale
        weighted = given * factor
        sums += given * normed
        gradient = scale * (weighted - normed * (tl.sum(weighted * normed, 0) / width))
        if ADD:
            gradient += tl.load(residual + start + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + x_start + columns, gradient.to(out.dtype.element_ty), mask=inside)
    tl.store(partial + program.to(tl.int64) * width + columns, sums, mask=inside)
