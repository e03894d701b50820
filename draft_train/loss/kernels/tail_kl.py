"""A kernel for the tail-bucket loss of rows of logits and its gradient. It reads the logits once.

Shape suffixes: T rows, V draft vocabulary, K teacher entries. The formulas are those of `loss.tail_bucket`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftcache.draft_train.loss.tail_bucket import fused_tail_bucket_loss
from draftcache.store.common.triton_launch import jit, power_of_two, tl

MOST_IN_REGISTERS = 32_768
"""Most logits of a row that a program keeps in registers: 64 per thread."""


def tail_kl(logits: Tensor, ids: Tensor, p: Tensor, tau: Tensor, weight: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Return losses [T] float32 and argmax [T] int64 of float32 logits [T, V]; write the weighted gradient to `out`.

    `ids` [T, K] int64, -1 where absent, `p` [T, K] float32, `tau` and `weight` [T] float32; `out` [T, V] receives
    `weight * d loss / d logits` in its dtype. The logits are overwritten at the teacher's entries. A tail below `tiny`,
    float32's smallest normal number, has no digits left and counts as `tiny`. This runs kernels only: elsewhere
    autograd goes through the definition.
    """
    (rows, width), entries = logits.shape, ids.shape[1]
    losses = torch.empty(rows, device=logits.device, dtype=torch.float32)
    argmax = torch.empty(rows, device=logits.device, dtype=torch.int64)
    if rows:
        taken = take_entries(logits, ids)
        block = min(MOST_IN_REGISTERS, power_of_two(width))
        processors = torch.cuda.get_device_properties(logits.device).multi_processor_count if logits.is_cuda else 4
        _tail_kl_kernel[(min(rows, processors),)](
            logits, ids, taken, p, tau, weight, out, losses, argmax, rows, width, entries,
            torch.finfo(torch.float32).tiny, BLOCK=block, WHOLE=width <= block, ENTRIES=power_of_two(entries),
            num_warps=16,
        )  # fmt: skip
    return losses, argmax


def take_entries(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the logits [T, K] of the teacher's entries, and overwrite them in `logits` [T, V] by -inf.

    It runs a kernel. The tail of a row can then be summed without the entries: 1 - sum q would cancel.
    """
    taken = torch.empty(ids.shape, device=logits.device, dtype=torch.float32)
    _take_entries_kernel[(len(ids),)](
        logits, ids, taken, logits.shape[1], ids.shape[1], ENTRIES=power_of_two(ids.shape[1]), num_warps=2
    )
    return taken


def tail_kl_reference(
    logits: Tensor, ids: Tensor, p: Tensor, tau: Tensor, weight: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Plain twin of `tail_kl`, by autograd over `fused_tail_bucket_loss`. It leaves the logits as they are."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        losses = fused_tail_bucket_loss(leaf, ids, p, tau, absent=bool((ids < 0).any()))
        (gradient,) = torch.autograd.grad(losses, leaf, weight.to(losses.dtype))
    out.copy_(gradient)
    return losses.detach(), logits.argmax(-1)


@jit
def _take_entries_kernel(logits, ids, inside, width, entries, ENTRIES: tl.constexpr):
    """Move the teacher's entries out of each row."""
    row = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, ENTRIES)
    named = tl.load(ids + row * entries + entry, mask=entry < entries, other=-1)
    present = named >= 0
    pointer = logits + row * width + named
    tl.store(inside + row * entries + entry, tl.load(pointer, mask=present, other=float("-inf")), mask=entry < entries)
    tl.debug_barrier()
    tl.store(pointer, float("-inf"), mask=present)


@jit
def _tail_kl_kernel(
    logits, ids, taken, p, tau, weight, out, losses, argmax, rows, width, entries, tiny,
    BLOCK: tl.constexpr, ENTRIES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """One program per processor keeps a row's exponentials in registers. A row wider than BLOCK is read twice."""
    column, entry = tl.arange(0, BLOCK), tl.arange(0, ENTRIES)
    for number in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(number, tl.int64)
        row_logits, row_out = logits + row * width, out + row * width
        value = tl.load(row_logits + column, mask=column < width, other=float("-inf"))
        named = tl.load(ids + row * entries + entry, mask=entry < entries, other=-1)
        present = named >= 0
        teacher = tl.load(p + row * entries + entry, mask=present, other=0.0)
        inside = tl.load(taken + row * entries + entry, mask=present, other=float("-inf"))
        tail = tl.where(tl.sum(present.to(tl.int32), 0) == width, 0.0, tl.load(tau + row))
        largest = tl.maximum(tl.max(value, 0), -1.0e38)  # finite even if the entries are the whole row
        largest_column = tl.min(tl.where(value == largest, column, width), 0)
        value = tl.exp(value - largest)
        rest = tl.sum(value, 0)
        if not WHOLE:
            for first in range(BLOCK, width, BLOCK):
                further = tl.load(row_logits + first + column, mask=first + column < width, other=float("-inf"))
                above = tl.maximum(largest, tl.max(further, 0))
                found = tl.min(tl.where(further == above, first + column, width), 0)
                largest_column = tl.where(above > largest, found, largest_column)
                rest = rest * tl.exp(largest - above) + tl.sum(tl.exp(further - above), 0)
                largest = above
        best_inside = tl.max(inside, 0)
        best = tl.maximum(best_inside, largest)
        first_inside = tl.min(tl.where(present & (inside == best), named, width), 0)
        tl.store(argmax + row, tl.minimum(first_inside, tl.where(largest == best, largest_column, width).to(tl.int64)))
        raised_inside = tl.exp(inside - best)
        shrink = tl.exp(largest - best)
        rest = tl.maximum(rest * shrink, tiny)
        normalizer = rest + tl.sum(raised_inside, 0)
        log_normalizer = tl.log(normalizer)
        head = tl.sum(tl.where(present, teacher * (inside - best - log_normalizer), 0.0), 0)
        tl.store(losses + row, -head - tail * (tl.log(rest) - log_normalizer))
        scale = tl.load(weight + row)
        total = tl.sum(teacher, 0) + tail
        factor = scale * (total / normalizer - tail / rest)
        dtype = out.dtype.element_ty
        if WHOLE:
            tl.store(row_out + column, (value * (shrink * factor)).to(dtype), mask=column < width)
        else:
            for first in range(0, width, BLOCK):
                again = tl.load(row_logits + first + column, mask=first + column < width, other=float("-inf"))
                raised = tl.exp(again - best) * factor
                tl.store(row_out + first + column, raised.to(dtype), mask=first + column < width)
        tl.debug_barrier()
        tl.store(row_out + named, ((raised_inside * (total / normalizer) - teacher) * scale).to(dtype), mask=present)
