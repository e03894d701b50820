"""Softmax statistics of rows of logits in one pass over them, and the largest logits of a row without sorting it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from draftcache.store.common.triton_launch import jit, runs_kernels, tl

_BLOCK = 4096
_PART = 64
"""Columns of a part of a row; the largest logit of every part is found first, to choose which parts to search."""


class RowStats(NamedTuple):
    """Per row of logits [R, V]: log-sum-exp [R] float32, and the lowest id of the largest logit [R] int64."""

    log_sum_exp: Tensor
    argmax: Tensor


class DraftLogits(NamedTuple):
    """Logits over a draft vocabulary of D words: [R, D] and their log-sum-exp [R], both float32."""

    logits: Tensor
    log_sum_exp: Tensor
    part_largest: Tensor
    """[R, D // 64] float32: the largest of every 64 columns; columns that are left over at the end have none."""


def row_stats(logits: Tensor) -> RowStats:
    """Statistics of float32 logits [R, V] with contiguous rows."""
    if not runs_kernels(logits):
        return row_stats_reference(logits)
    rows, width = logits.shape
    log_sum_exp = torch.empty(rows, device=logits.device, dtype=torch.float32)
    argmax = torch.empty(rows, device=logits.device, dtype=torch.int64)
    _row_stats_kernel[(rows,)](logits, log_sum_exp, argmax, logits.stride(0), width, BLOCK=_BLOCK, num_warps=8)
    return RowStats(log_sum_exp, argmax)


def row_stats_reference(logits: Tensor) -> RowStats:
    """Plain twin of `row_stats`, in several passes over the logits."""
    ids = torch.arange(logits.shape[1], device=logits.device)
    largest = logits.max(dim=-1, keepdim=True).values
    argmax = torch.where(logits == largest, ids, logits.shape[1]).min(dim=-1).values
    return RowStats(torch.logsumexp(logits, dim=-1), argmax)


def draft_logits(logits: Tensor, target_ids: Tensor) -> DraftLogits:
    """The columns `target_ids` [D] int64 of float32 logits [R, V] with contiguous rows, and their statistics."""
    if not runs_kernels(logits):
        return draft_logits_reference(logits, target_ids)
    rows, width = logits.shape[0], target_ids.shape[0]
    made = DraftLogits(*(logits.new_empty(shape) for shape in ((rows, width), (rows,), (rows, width // _PART))))
    _draft_logits_kernel[(rows,)](
        logits, target_ids, *made, logits.stride(0), width, BLOCK=_BLOCK, PART=_PART, num_warps=8
    )
    return made


def draft_logits_reference(logits: Tensor, target_ids: Tensor) -> DraftLogits:
    """Plain twin of `draft_logits`."""
    chosen = logits.index_select(1, target_ids)
    return DraftLogits(chosen, torch.logsumexp(chosen, dim=-1), part_largest(chosen))


def part_largest(logits: Tensor) -> Tensor:
    """The largest of every 64 columns of logits [R, V]: [R, V // 64]."""
    rows, parts = logits.shape[0], logits.shape[1] // _PART
    return logits[:, : parts * _PART].reshape(rows, parts, _PART).amax(dim=-1)


def largest(logits: Tensor, part_largest: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """`torch.topk` of rows [R, V]: values [R, number], largest first, and their columns int64; any among equals.

    The `number` largest logits are in the `number` parts whose largest logits are largest, so only those parts are
    searched, where `torch.topk` would read the whole row several times.
    """
    rows, parts = part_largest.shape
    if parts <= number:
        values, columns = torch.topk(logits, number, dim=-1)
        return values, columns
    edge = parts * _PART
    chosen = torch.topk(part_largest, number, dim=-1, sorted=False).indices
    searched = logits[:, :edge].reshape(rows, parts, _PART).gather(1, chosen[..., None].expand(-1, -1, _PART))
    values, found = torch.topk(torch.cat((searched.flatten(1), logits[:, edge:]), dim=1), number, dim=-1)
    within = chosen.gather(1, (found // _PART).clamp(max=number - 1)) * _PART + found % _PART
    return values, torch.where(found < number * _PART, within, found + (edge - number * _PART))


@jit
def _row_stats_kernel(logits, log_sum_exp, argmax, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    # Every lane keeps a running maximum, the column of that maximum and a sum; the lanes are reduced once, at the end.
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    largest_column = tl.zeros((BLOCK,), tl.int32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        inside = first + column < width
        value = tl.load(logits + row * stride + first + column, mask=inside, other=float("-inf"))
        above = tl.maximum(largest, value)
        safe = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(largest - safe) + tl.exp(value - safe)
        largest_column = tl.where(value > largest, first + column, largest_column)
        largest = above
    best = tl.max(largest, 0)
    tl.store(log_sum_exp + row, best + tl.log(tl.sum(total * tl.exp(largest - best), 0)))
    tl.store(argmax + row, tl.min(tl.where(largest == best, largest_column, width), 0).to(tl.int64))


@jit
def _draft_logits_kernel(
    logits, target_ids, chosen, log_sum_exp, part_largest, stride, width, BLOCK: tl.constexpr, PART: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    part = tl.arange(0, BLOCK // PART)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        inside = first + column < width
        target = tl.load(target_ids + first + column, mask=inside, other=0)
        value = tl.load(logits + row * stride + target, mask=inside, other=float("-inf"))
        tl.store(chosen + row * width + first + column, value, mask=inside)
        above = tl.maximum(largest, value)
        safe = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp(largest - safe) + tl.exp(value - safe)
        largest = above
        number = first // PART + part
        of_part = tl.max(tl.reshape(value, (BLOCK // PART, PART)), 1)
        tl.store(part_largest + row * (width // PART) + number, of_part, mask=number < width // PART)
    best = tl.max(largest, 0)
    tl.store(log_sum_exp + row, best + tl.log(tl.sum(total * tl.exp(largest - best), 0)))
