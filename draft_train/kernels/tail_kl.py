"""The tail-bucket loss of rows of logits and its gradient, by one program per row.

Shape suffixes: T rows, V draft vocabulary, K teacher entries. The formulas are those of `draft_train.losses`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draft_train.losses import fused_tail_bucket_loss
from store.triton_launch import jit, power_of_two, tl


def tail_kl(logits: Tensor, ids: Tensor, p: Tensor, tau: Tensor, weight: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Loss [T] float32 and argmax [T] int64 of float32 logits [T, V]; `weight * d loss / d logits` into `out` [T, V].

    `ids` [T, K] int64, -1 where absent, `p` [T, K] float32, `tau` and `weight` [T] float32. The logits are overwritten
    at the teacher's entries. Below `tiny` the tail has no digits left and counts as `tiny`.
    """
    if not logits.is_cuda:
        return tail_kl_reference(logits, ids, p, tau, weight, out)
    rows, width = logits.shape
    losses = torch.empty(rows, device=logits.device, dtype=torch.float32)
    argmax = torch.empty(rows, device=logits.device, dtype=torch.int64)
    if rows:
        _tail_kl_kernel[(rows,)](
            logits, ids, p, tau, weight, out, losses, argmax, width, ids.shape[1], torch.finfo(torch.float32).tiny,
            BLOCK=min(4096, power_of_two(width)), ENTRIES=power_of_two(ids.shape[1]), num_warps=8,
        )  # fmt: skip
    return losses, argmax


def tail_kl_reference(
    logits: Tensor, ids: Tensor, p: Tensor, tau: Tensor, weight: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """See `tail_kl`; by autograd."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        losses = fused_tail_bucket_loss(leaf, ids, p, tau, absent=bool((ids < 0).any()))
        (gradient,) = torch.autograd.grad(losses, leaf, weight.to(losses.dtype))
    out.copy_(gradient)
    return losses.detach(), logits.argmax(-1)


@jit
def _tail_kl_kernel(
    logits, ids, p, tau, weight, out, losses, argmax, width, entries, tiny,
    BLOCK: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_logits, row_out = logits + row * width, out + row * width
    entry = tl.arange(0, ENTRIES)
    named = tl.load(ids + row * entries + entry, mask=entry < entries, other=-1)
    present = named >= 0
    teacher = tl.load(p + row * entries + entry, mask=present, other=0.0)
    whole = tl.sum(present.to(tl.int32), 0) == width
    tail = tl.where(whole, 0.0, tl.load(tau + row))
    inside = tl.load(row_logits + named, mask=present, other=float("-inf"))
    # The entries leave the row, so that what is left is summed by itself: 1 - sum of q would cancel.
    tl.debug_barrier()
    tl.store(row_logits + named, float("-inf"), mask=present)
    tl.debug_barrier()
    # Two readings, the second from the cache where a few rows per processor fit: a row in registers would leave no
    # room for a second program that loads while this one computes.
    column = tl.arange(0, BLOCK)
    largest = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = tl.zeros((BLOCK,), tl.int32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, width, BLOCK):
        value = tl.load(row_logits + first + column, mask=first + column < width, other=float("-inf"))
        above = tl.maximum(largest, value)
        safe = tl.where(above == float("-inf"), 0.0, above)
        sums = sums * tl.exp(largest - safe) + tl.exp(value - safe)
        place = tl.where(value > largest, first + column, place)
        largest = above
    best_inside = tl.max(inside, 0)
    best = tl.maximum(best_inside, tl.max(largest, 0))
    first_inside = tl.min(tl.where(present & (inside == best), named, width), 0)
    first_outside = tl.min(tl.where(largest == best, place, width), 0)
    tl.store(argmax + row, tl.minimum(first_inside, first_outside.to(tl.int64)))
    raised_inside = tl.exp(inside - best)
    rest = tl.maximum(tl.sum(sums * tl.exp(largest - best), 0), tiny)
    normalizer = rest + tl.sum(raised_inside, 0)
    log_normalizer = tl.log(normalizer)
    head = tl.sum(tl.where(present, teacher * (inside - best - log_normalizer), 0.0), 0)
    tl.store(losses + row, -head - tail * (tl.log(rest) - log_normalizer))
    scale = tl.load(weight + row)
    total = tl.sum(teacher, 0) + tail
    factor = scale * (total / normalizer - tail / rest)
    dtype = out.dtype.element_ty
    for first in range(0, width, BLOCK):
        value = tl.load(row_logits + first + column, mask=first + column < width, other=float("-inf"))
        tl.store(row_out + first + column, (tl.exp(value - best) * factor).to(dtype), mask=first + column < width)
    tl.debug_barrier()
    tl.store(row_out + named, ((raised_inside * (total / normalizer) - teacher) * scale).to(dtype), mask=present)
