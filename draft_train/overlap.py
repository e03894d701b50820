"""How often speculative sampling accepts a draft token: bounds from the stored teacher, without the full logits.

With verifier probabilities p and draft probabilities q at a temperature T, a draft token is accepted with probability
`alpha = sum_x min(p_x, q_x)`. The draft proposes from its vocabulary D, so the sum is over D. Of p the store holds, at
T = 1: the entries S in D, `p_i = exp(z_i - log_z_full)`; the mass of D, `m = exp(log_z_draft - log_z_full)`; hence the
mass of the tail D \\ S, `t = m - sum_S p_i`, and that of everything outside D, `o = 1 - m`.

At T = 1:

    sum_S min(p_i, q_i)  <=  alpha  <=  sum_S min(p_i, q_i) + min(t, 1 - sum_S q_i)

At another temperature, with b = 1 / T, p_x becomes `p_x^b / W`, where `W = sum_V p_x^b`. For a group of n tokens whose
mass is t at T = 1, and of which none has more than c, `G = sum p_x^b` lies between

    A = t c^(b - 1)        (all mass in tokens of c)          and
    B = t^b n^(1 - b)      (the mass spread evenly):          B <= G <= A for b > 1,  A <= G <= B for b < 1.

Both follow from `p^b = p p^(b-1)` with p <= c, and from Jensen's inequality. For the tail, c is the smallest stored p,
as stored entries are the largest, or t if that is less. Outside D, c is o, or the largest stored p where the verifier's
argmax lies in D. With `W_low` and `W_high`, the sums over S and both groups,

    sum_S min(p_i^b / W_high, q_i)  <=  alpha  <=  sum_S min(p_i^b / W_low, q_i) + min(u, 1 - sum_S q_i)

with u = G_high / (sum_S p_i^b + G_high + O_low), the most that the tail can be of W. With teacher "hidden", S is all of
D and there is no tail.

Stored gaps are float16: an entry's logit is known to within 2^-11 of its gap, and a gap is at most -log p_i. Every p_i
is therefore taken with the end of `p_i exp(-+(2^-11 (-log p_i) + 2e-5))` that makes the bound hold, where 2e-5 covers
float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draftcache.draft_train.data.batches import Batch
from draftcache.draft_train.data.frozen import FrozenWeights
from draftcache.store.common.products import float32_product, scale_and_cap

_GAP_ROUNDING = 2.0**-11
_FLOAT_ROUNDING = 2e-5
_MOST_ENTRIES = 1 << 24
"""Teacher entries that are compared with the draft at once: 128 MB for each of a dozen tensors."""


@dataclass(frozen=True)
class TeacherRows:
    """The stored teacher of A rows over a draft vocabulary of D ids, in nats at T = 1."""

    ids: Tensor
    """[A, K] int64 draft ids; -1 where an entry is absent."""
    log_p: Tensor
    """[A, K] float: log of the entries' probabilities over the whole vocabulary; -inf where absent."""
    log_mass: Tensor
    """[A] float: log of the probability of the draft vocabulary."""
    argmax_inside: Tensor
    """[A] bool: whether the verifier's argmax lies in the draft vocabulary."""
    vocab_size: int
    """V, the tokens of the whole vocabulary."""
    rounding: float = _GAP_ROUNDING
    """How far an entry's logit may be from the stored one, in parts of its gap."""


def teacher_rows(batch: Batch, rows: Tensor, frozen: FrozenWeights, inside: Tensor) -> TeacherRows:
    """Return the teacher at rows [A] of a batch's teacher arrays. `inside` [V] bool is the draft vocabulary."""
    log_z = batch.log_z_full[rows].double()
    if batch.teacher_hidden is not None:
        product = float32_product(batch.teacher_hidden[rows], frozen.lm_head)
        logits = scale_and_cap(product, frozen.head_form.scale, frozen.head_form.cap)
        ids = torch.arange(logits.shape[1], device=rows.device).expand_as(logits)
    else:
        ids, logits = batch.teacher_ids[rows], batch.teacher_logits[rows]
    return TeacherRows(
        ids=ids,
        log_p=logits.double() - log_z[:, None],
        log_mass=batch.log_z_draft[rows].double() - log_z,
        argmax_inside=inside[batch.argmax[rows]],
        vocab_size=inside.shape[0],
        rounding=_GAP_ROUNDING if batch.teacher_hidden is None else 0.0,
    )


def rows_at_once(entries: int) -> int:
    """Return the rows of `overlap_bounds` that memory allows for teachers of so many entries."""
    return max(1, _MOST_ENTRIES // max(1, entries))


def overlap_bounds(logits: Tensor, teacher: TeacherRows, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the lower and upper bounds [A] float64 of alpha for draft logits [A, D]: see the module's docstring."""
    power = 1.0 / temperature
    present = teacher.ids >= 0
    scaled = logits.float() / temperature
    normalizer = torch.logsumexp(scaled, dim=-1, keepdim=True)
    q = torch.exp(scaled.gather(1, teacher.ids.clamp(min=0)) - normalizer).double().masked_fill(~present, 0.0)
    slack = teacher.rounding * (-teacher.log_p).clamp(0.0, 60.0) + _FLOAT_ROUNDING
    low, high = (torch.exp(power * (teacher.log_p + sign * slack)) for sign in (-1, 1))
    tail, out = _groups(teacher, slack, present, logits.shape[1], power)
    if temperature == 1.0:
        whole_low = whole_high = torch.ones_like(teacher.log_mass)  # log_z_full is the sum
    else:
        whole_low = low.sum(-1) + tail[0] + out[0]
        whole_high = high.sum(-1) + tail[1] + out[1]
    share = tail[1] if temperature == 1.0 else tail[1] / (low.sum(-1) + tail[1] + out[0])
    lower = torch.minimum(low / whole_high[:, None], q).sum(-1)
    upper = torch.minimum(high / whole_low[:, None], q).sum(-1)
    upper = upper + torch.minimum(share, (1.0 - q.sum(-1)).clamp(min=0.0))
    # q is of float32, too.
    return (lower - _FLOAT_ROUNDING).clamp(0.0, 1.0), (upper + _FLOAT_ROUNDING).clamp(0.0, 1.0)


def _groups(
    teacher: TeacherRows, slack: Tensor, present: Tensor, size: int, power: float
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return bounds of `sum p_x^b` of the tail and of what is outside the draft vocabulary, each [A] float64."""
    p_low, p_high = torch.exp(teacher.log_p - slack), torch.exp(teacher.log_p + slack)
    mass_low = torch.exp(teacher.log_mass - _FLOAT_ROUNDING).clamp(max=1.0)
    mass_high = torch.exp(teacher.log_mass + _FLOAT_ROUNDING).clamp(max=1.0)
    count = size - present.sum(-1)
    tail_high = torch.where(count > 0, (mass_high - p_low.sum(-1)).clamp(min=0.0), 0.0)
    tail_low = torch.minimum((mass_low - p_high.sum(-1)).clamp(min=0.0), tail_high)
    smallest = p_high.masked_fill(~present, torch.inf).amin(-1)
    tail = _power_bounds(tail_low, tail_high, torch.minimum(smallest, tail_high), count, power)
    outside = teacher.vocab_size - size
    out_high = (1.0 - mass_low) if outside else torch.zeros_like(mass_low)
    out_low = torch.minimum((1.0 - mass_high).clamp(min=0.0), out_high)
    largest = p_high.masked_fill(~present, 0.0).amax(-1)
    cap = torch.where(teacher.argmax_inside & present.any(-1), torch.minimum(largest, out_high), out_high)
    return tail, _power_bounds(out_low, out_high, cap, torch.full_like(count, outside), power)


def _power_bounds(low: Tensor, high: Tensor, cap: Tensor, count: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """Return bounds [A] of `sum p^power` over `count` tokens that have a mass of `low` to `high` and at most `cap`."""
    if power == 1.0:
        return low, high
    many = count.clamp(min=1).double()
    tiny = torch.finfo(torch.float64).tiny
    at_cap = cap.clamp(min=tiny) ** (power - 1.0)
    spread = many ** (1.0 - power)
    if power > 1.0:
        return low**power * spread, torch.where(high > 0, high * at_cap, 0.0)
    return torch.where(low > 0, low * at_cap, 0.0), high**power * spread
