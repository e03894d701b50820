"""Softmax statistics of rows of logits in one pass over them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from store.triton_launch import jit, runs_kernels, tl

_BLOCK = 4096


class RowStats(NamedTuple):
    """Per row of logits [R, V]: log-sum-exp [R] float32, and the lowest id of the largest logit [R] int64."""

    log_sum_exp: Tensor
    argmax: Tensor


def row_stats(logits: Tensor) -> RowStats:
    """Statistics of float32 logits [R, V], rows contiguous."""
    if not runs_kernels(logits):
        return row_stats_reference(logits)
    rows, width = logits.shape
    log_sum_exp = torch.empty(rows, device=logits.device, dtype=torch.float32)
    argmax = torch.empty(rows, device=logits.device, dtype=torch.int64)
    _row_stats_kernel[(rows,)](logits, log_sum_exp, argmax, logits.stride(0), width, BLOCK=_BLOCK, num_warps=8)
    return RowStats(log_sum_exp, argmax)


def row_stats_reference(logits: Tensor) -> RowStats:
    """See `row_stats`."""
    ids = torch.arange(logits.shape[1], device=logits.device)
    largest = logits.max(dim=-1, keepdim=True).values
    argmax = torch.where(logits == largest, ids, logits.shape[1]).min(dim=-1).values
    return RowStats(torch.logsumexp(logits, dim=-1), argmax)


@jit
def _row_stats_kernel(logits, log_sum_exp, argmax, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    # Every lane keeps its own running maximum, its place and its sum; they meet once, at the end.
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        inside = first + column < width
        value = tl.load(logits + row * stride + first + column, mask=inside, other=float("-inf"))
        above = tl.maximum(largest, value)
        safe = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(largest - safe) + tl.exp(value - safe)
        place = tl.where(value > largest, first + column, place)
        largest = above
    best = tl.max(largest, 0)
    tl.store(log_sum_exp + row, best + tl.log(tl.sum(total * tl.exp(largest - best), 0)))
    tl.store(argmax + row, tl.min(tl.where(largest == best, place, width), 0).to(tl.int64))
