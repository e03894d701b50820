"""RMS norms: the residual stream's, fused with the addition before it, and Mamba-2's gated group norm."""

from __future__ import annotations

import torch
from torch import Tensor

from draftcache.store.common.triton_launch import jit, power_of_two, runs_kernels, tl

_GATED_ROWS = 4


def add_rms_norm(residual: Tensor, update: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns `x = residual + update` and its norm, `weight * x / sqrt(mean(x^2) + eps)`, both in x's dtype.

    residual, update [..., H] contiguous; without an update x is the residual. The norm is computed in float32. The sum
    overwrites `update`.
    """
    if not runs_kernels(residual):
        return add_rms_norm_reference(residual, update, weight, eps)
    width = residual.shape[-1]
    out = torch.empty_like(residual)
    rows = residual.numel() // width
    total = residual if update is None else update
    _add_rms_norm_kernel[(rows,)](
        residual, total, weight, out, width, eps, ADD=update is not None, BLOCK=power_of_two(width), num_warps=8
    )
    return total, out


def add_rms_norm_reference(
    residual: Tensor, update: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Plain twin of `add_rms_norm`; it leaves `update` as it is."""
    total = residual if update is None else residual + update
    values = total.float()
    normed = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    return total, (weight.float() * normed).to(total.dtype)


def gated_group_norm(values: Tensor, gate: Tensor, weight: Tensor, eps: float, group: int) -> Tensor:
    """`weight * norm(values * silu(gate))` over groups of `group` channels, rounded before the weight is applied.

    values [B, L, I] contiguous; gate [B, L, I] with any stride between rows (a slice of the projection). The result
    [B, L, I] overwrites `values`.
    """
    if not runs_kernels(values):
        return gated_group_norm_reference(values, gate, weight, eps, group)
    width = values.shape[-1]
    rows = values.numel() // width
    flat = gate.flatten(0, 1)
    _gated_group_norm_kernel[(rows, width // group)](
        values, flat, weight, flat.stride(0), width, eps, GROUP=group, BLOCK=power_of_two(group), num_warps=4
    )
    return values


def gated_group_norm_reference(values: Tensor, gate: Tensor, weight: Tensor, eps: float, group: int) -> Tensor:
    """Plain twin of `gated_group_norm`; it leaves `values` as they are."""
    gated = values.float() * torch.nn.functional.silu(gate.float())
    grouped = gated.view(*gated.shape[:-1], -1, group)
    grouped = grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + eps)
    return weight * grouped.view(values.shape).to(values.dtype)


@jit
def _add_rms_norm_kernel(residual, total, weight, out, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(residual + start + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        values += tl.load(total + start + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + start + columns, rounded, mask=inside)
        values = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 0) / width + eps)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + start + columns, (factor * (values * scale)).to(out.dtype.element_ty), mask=inside)


@jit
def _gated_group_norm_kernel(values, gate, weight, gate_stride, width, eps, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * GROUP + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < GROUP
    addresses = values + row * width + columns
    z = tl.load(gate + row * gate_stride + columns, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(addresses, mask=inside, other=0.0).to(tl.float32) * (z / (1.0 + tl.exp(-z)))
    scale = 1.0 / tl.sqrt(tl.sum(y * y, 0) / GROUP + eps)
    rounded = (y * scale).to(values.dtype.element_ty).to(tl.float32)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(addresses, (factor * rounded).to(values.dtype.element_ty), mask=inside)
