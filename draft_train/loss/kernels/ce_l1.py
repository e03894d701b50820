"""A kernel for the loss `ce-l1` of rows of logits and its gradient. It reads the logits once.

With q = softmax(z), x the text's next token, S the teacher's entries, their probabilities m p_i over the verifier's
vocabulary and the tail m tau, `L = 0.1 (log Z - z_x) + 1.8 (1 - alpha)` with `alpha = sum_S min(m p_i, q_i) +
min(m tau, q_tail)`. Let a_i be 1 where q_i is the smaller one, else 0, for entries and tail alike, and
`A = sum_S a_i q_i + a_tail q_tail`. Then `dL/dz_j = q_j (0.1 + 1.8 A - 1.8 a_j) - 0.1 [j = x]`.

Shape suffixes: T rows, V draft vocabulary, K teacher entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftcache.draft_train.loss.kernels.tail_kl import MOST_IN_REGISTERS, take_entries
from draftcache.store.common.triton_launch import jit, power_of_two, tl

CROSS_ENTROPY, DISTANCE = 0.1, 0.9
"""The shares of cross entropy and L1 distance."""


def ce_l1(
    logits: Tensor, ids: Tensor, p: Tensor, tau: Tensor, realised: Tensor, weight: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Return losses [T] float32 and argmax [T] int64 of float32 logits [T, V]; write the weighted gradient to `out`.

    `ids` [T, K] int64, -1 where absent, `p` [T, K] and `tau` [T] float32, both times the mass m; `realised` [T] int64,
    -1 where the token is outside the draft vocabulary; `weight` [T] float32; `out` [T, V] receives
    `weight * d loss / d logits` in its dtype. The logits are overwritten at the teacher's entries. This runs kernels
    only: elsewhere autograd goes through the definition.
    """
    (rows, width), entries = logits.shape, ids.shape[1]
    losses = torch.empty(rows, device=logits.device, dtype=torch.float32)
    argmax = torch.empty(rows, device=logits.device, dtype=torch.int64)
    if rows:
        text = logits.gather(1, realised.clamp(min=0)[:, None])[:, 0]
        taken = take_entries(logits, ids)
        block = min(MOST_IN_REGISTERS, power_of_two(width))
        processors = torch.cuda.get_device_properties(logits.device).multi_processor_count if logits.is_cuda else 4
        _ce_l1_kernel[(min(rows, processors),)](
            logits, ids, taken, p, tau, realised, text, weight, out, losses, argmax, rows, width, entries,
            BLOCK=block, WHOLE=width <= block, ENTRIES=power_of_two(entries), num_warps=16,
        )  # fmt: skip
    return losses, argmax


@jit(varying=("rows",))
def _ce_l1_kernel(
    logits, ids, taken, p, tau, realised, text, weight, out, losses, argmax, rows, width, entries,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, ENTRIES: tl.constexpr,
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
        shrink = tl.exp(largest - best)
        raised_inside = tl.exp(inside - best)
        normalizer = rest * shrink + tl.sum(raised_inside, 0)
        q_tail, q_inside = rest * shrink / normalizer, raised_inside / normalizer
        tail = tl.load(tau + row)
        below_inside = tl.where(present & (q_inside < teacher), 1.0, 0.0)
        below_tail = tl.where(q_tail < tail, 1.0, 0.0)
        alpha = tl.sum(tl.where(present, tl.minimum(teacher, q_inside), 0.0), 0) + tl.minimum(tail, q_tail)
        share = tl.sum(below_inside * q_inside, 0) + below_tail * q_tail
        token = tl.load(realised + row)
        known = tl.where(token >= 0, 0.1, 0.0)
        surprise = tl.log(normalizer) + best - tl.load(text + row)
        tl.store(losses + row, known * surprise + 1.8 * (1.0 - alpha))
        scale = tl.load(weight + row)
        common = known + 1.8 * share
        factor = scale * (common - 1.8 * below_tail) / normalizer
        dtype = out.dtype.element_ty
        if WHOLE:
            tl.store(row_out + column, (value * (shrink * factor)).to(dtype), mask=column < width)
        else:
            for first in range(0, width, BLOCK):
                again = tl.load(row_logits + first + column, mask=first + column < width, other=float("-inf"))
                raised = tl.exp(again - best) * factor
                tl.store(row_out + first + column, raised.to(dtype), mask=first + column < width)
        # The text's token, if it is no entry of the teacher, and then the entries, which may hold it.
        at_text = tl.exp(tl.load(text + row) - best) * factor - scale * known
        in_entries = tl.sum(tl.where(present & (named == token), 1, 0), 0) > 0
        tl.debug_barrier()
        tl.store(row_out + tl.maximum(token, 0), at_text.to(dtype), mask=(token >= 0) & (in_entries == 0))
        here = tl.where(named == token, known, 0.0)
        of_entries = (q_inside * (common - 1.8 * below_inside) - here) * scale
        tl.store(row_out + named, of_entries.to(dtype), mask=present)
