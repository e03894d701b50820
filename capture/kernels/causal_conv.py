"""Mamba-2's depthwise causal convolution with SiLU, over rows that are slices of a wider projection."""

from __future__ import annotations

import torch
from torch import Tensor

from draftcache.store.common.triton_launch import jit, runs_kernels, tl

TAPS = 4
"""Kernel length that the Triton form is written for."""
_ROWS, _CHANNELS = 32, 128


def causal_conv_silu(rows: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None) -> Tensor:
    """`silu(bias + sum_j weight[c, j] * x[t - K + 1 + j, c])`, in float32; returns [B, L, C] in x's dtype.

    x is `rows` [B, L, C], with contiguous channels and any stride between rows; weight [C, K]; bias [C]; `before`
    [B, K - 1, C] are the rows before the first one, zeros where None.
    """
    if not runs_kernels(rows) or weight.shape[1] != TAPS:
        return causal_conv_silu_reference(rows, weight, bias, before)
    batch, length, channels = rows.shape
    out = torch.empty(batch, length, channels, device=rows.device, dtype=rows.dtype)
    grid = (-(-length // _ROWS), -(-channels // _CHANNELS), batch)
    before = None if before is None else before.contiguous()
    _causal_conv_kernel[grid](
        rows, weight.contiguous(), bias, before, out, length, channels, rows.stride(0), rows.stride(1),
        BIAS=bias is not None, BEFORE=before is not None, ROWS=_ROWS, CHANNELS=_CHANNELS, num_warps=4,
    )  # fmt: skip
    return out


def causal_conv_silu_reference(rows: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None) -> Tensor:
    """Plain twin of `causal_conv_silu`, by torch's convolution; kernels of any length K."""
    taps = weight.shape[1]
    earlier = rows.new_zeros(rows.shape[0], taps - 1, rows.shape[2]) if before is None else before
    padded = torch.cat([earlier, rows], 1).float().transpose(1, 2)
    mixed = torch.nn.functional.conv1d(
        padded, weight.float()[:, None], None if bias is None else bias.float(), groups=rows.shape[2]
    )
    return torch.nn.functional.silu(mixed).transpose(1, 2).to(rows.dtype)


@jit
def _causal_conv_kernel(
    rows, weight, bias, before, out, length, channels, batch_stride, row_stride,
    BIAS: tl.constexpr, BEFORE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    mixed = tl.zeros((ROWS, CHANNELS), tl.float32)
    if BIAS:
        mixed += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(4):
        source = row - 3 + tap
        address = rows + batch * batch_stride + source.to(tl.int64)[:, None] * row_stride + channel[None, :]
        valid = (source >= 0) & (source < length)
        value = tl.load(address, mask=valid[:, None] & known[None, :], other=0.0).to(tl.float32)
        if BEFORE:
            earlier = before + (batch * 3 + source + 3)[:, None] * channels + channel[None, :]
            value += tl.load(earlier, mask=(source < 0)[:, None] & known[None, :], other=0.0).to(tl.float32)
        value *= tl.load(weight + channel * 4 + tap, mask=known, other=0.0).to(tl.float32)[None, :]
        mixed += value
    result = mixed / (1.0 + tl.exp(-mixed))
    target = out + (batch * length + row)[:, None] * channels + channel[None, :]
    tl.store(target, result.to(out.dtype.element_ty), mask=(row < length)[:, None] & known[None, :])
