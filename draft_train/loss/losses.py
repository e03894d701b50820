"""Losses of one row over the draft vocabulary D, of draft logits against a teacher of which entries are stored.

Teacher: `p_i` for the stored entries S, and the tail mass `tau = 1 - sum_S p_i`, exact because log Z is stored. Draft:
`q = softmax(logits)`, and its own tail `1 - sum_S q_i`. S and the tail are |S| + 1 outcomes.

- `tail-kl`, the default: `-sum_S p_i log q_i - tau log(1 - sum_S q_i)`, cross entropy over these outcomes. Head and
  total tail are exact; only the shape inside the tail is not, so the gradient is off by at most 2 tau in L1. It equals
  the KL divergence up to the teacher's own entropy, which has no gradient.
- `renormalized-kl`: `-sum_S p_i / (1 - tau) log q_i`, as trainers do that keep a top-k without its log Z: for
  comparison with them. Its gradient is biased by exactly 2 tau in L1: the draft learns that the tail is impossible.
- `tv`: `1 - alpha` with `alpha = sum_S min(m p_i, q_i) + min(m tau, 1 - sum_S q_i)`, where m = p(D) is the verifier's
  probability of the whole draft vocabulary. Over all single outcomes alpha is the share of drafted tokens that
  speculative sampling accepts, and 1 - alpha the total variation distance (Leviathan et al., arXiv 2211.17192). With
  the tail as one outcome, alpha is at most min(m tau, 1 - sum_S q_i) too large.
- `lk`: `lambda KL + (1 - lambda)(1 - alpha)` with `lambda = exp(-3 alpha)`, through which no gradient flows, and the
  KL over D of `tail-kl`: the hybrid of Samarin et al., "LK Losses", arXiv 2602.23881, sections 4.2 and 4.4, with the
  rate that they found best. KL leads while the draft is far off, where alpha's gradient vanishes. They take lambda
  from the mean alpha of an unroll step's rows; here it is the row's own, so that a row's loss depends on no other row,
  whichever slice, pack or rank that one is in.
- `lk-alpha`: `-log alpha`, the same paper's likelihood of acceptance: `tv` with 1 / alpha times its gradient.

Entries that are absent (id -1) are not in S. Where S is empty, tau = 1 and nothing has a gradient; where S is all of D,
there is no tail, and tau counts as 0, whatever rounding left. Where p is known over all of D, S is D.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from draftcache.draft_train.config import LOSSES

LK_DECAY = 3.0
"""lambda = exp(-3 alpha)."""

RowLoss = Callable[
    [torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor
]
"""Draft logits [T, V] float32, ids [T, K] int64 (-1 absent; None where p is of all V ids in order), p [T, K], tau [T]
(None with ids), m [T] (None: 1) -> losses [T]. Only logits get a gradient."""


def row_loss(kind: str, *, absent: bool = True) -> RowLoss:
    """The loss of that name in `LOSSES`. `absent` False promises that no id is -1."""
    if kind not in LOSSES:
        raise ValueError(f"expected one of {LOSSES}, found {kind!r}")

    def loss(
        logits: torch.Tensor,
        ids: torch.Tensor | None,
        p: torch.Tensor,
        tau: torch.Tensor | None,
        mass: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if kind == "tail-kl":
            return _cross_entropy(logits, ids, p, tau, absent)
        if kind == "renormalized-kl":
            return renormalized_loss(logits, ids, p)
        alpha = acceptance(logits, ids, p, tau, mass)
        if kind == "tv":
            return 1.0 - alpha
        if kind == "lk-alpha":  # below the smallest normal number alpha has no digits left, nor a usable gradient
            return -alpha.clamp(min=torch.finfo(alpha.dtype).tiny).log()
        kl = _cross_entropy(logits, ids, p, tau, absent) + _negative_entropy(p, tau)
        blend = torch.exp(-LK_DECAY * alpha.detach())
        return blend * kl + (1.0 - blend) * (1.0 - alpha)

    return loss


def acceptance(
    logits: torch.Tensor,
    ids: torch.Tensor | None,
    p: torch.Tensor,
    tau: torch.Tensor | None,
    mass: torch.Tensor | None = None,
) -> torch.Tensor:
    """alpha [T], the tail as one outcome; arguments as `RowLoss` has them."""
    q = torch.softmax(logits, dim=-1)
    mass = logits.new_ones(len(logits)) if mass is None else mass.to(q.dtype)
    scaled = p.to(q.dtype) * mass[:, None]
    if ids is None:
        return torch.minimum(scaled, q).sum(-1)
    assert tau is not None, "stored entries come with their tail"
    places = torch.where(ids >= 0, ids, logits.shape[1])  # one column more takes what is absent
    outside = torch.ones(len(logits), logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
    outside = outside.scatter_(1, places, False)[:, :-1]
    tail = q.masked_fill(~outside, 0.0).sum(-1)  # not 1 - sum q, which cancels
    head = torch.minimum(scaled, q.gather(1, ids.clamp(min=0)))  # p = 0 where absent
    return head.sum(-1) + torch.minimum(tau.to(q.dtype) * mass, tail)


def renormalized_loss(logits: torch.Tensor, ids: torch.Tensor | None, p: torch.Tensor) -> torch.Tensor:
    """Cross entropy [T] to the stored entries, scaled up to sum 1; 0 where none is stored."""
    p = p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    if ids is None:
        return F.cross_entropy(logits, p.to(logits.dtype), reduction="none")
    return _head_loss(logits, ids.clamp(min=0), p, torch.logsumexp(logits, dim=-1))


def _cross_entropy(
    logits: torch.Tensor, ids: torch.Tensor | None, p: torch.Tensor, tau: torch.Tensor | None, absent: bool
) -> torch.Tensor:
    if ids is None:
        return F.cross_entropy(logits, p.to(logits.dtype), reduction="none")
    assert tau is not None, "stored entries come with their tail"
    return fused_tail_bucket_loss(logits, ids, p, tau, absent=absent)


def _negative_entropy(p: torch.Tensor, tau: torch.Tensor | None) -> torch.Tensor:
    known = torch.xlogy(p, p).sum(-1)
    return known if tau is None else known + torch.xlogy(tau, tau)


def tail_bucket_loss(
    logits: torch.Tensor, teacher_ids: torch.Tensor, p: torch.Tensor, tau: torch.Tensor
) -> torch.Tensor:
    """Per-row loss [T] of draft logits [T, V]; `teacher_ids` [T, K] int64, `p` [T, K], `tau` [T]. The plain twin.

    Ids are distinct or -1, where p is 0. The tail's log-probability is a log-sum-exp over the entries outside S, not
    log(1 - sum q), which cancels.
    """
    log_normalizer = torch.logsumexp(logits, dim=-1)
    # One column more takes what is absent. It is no outcome, but where no other is left it keeps the sum from 0.
    present, whole = _present(teacher_ids, logits.shape[1])
    extra = torch.full_like(whole, -torch.inf, dtype=logits.dtype).masked_fill(whole, 0.0)
    places = torch.where(present, teacher_ids, logits.shape[1])
    outside = torch.cat((logits, logits.new_zeros(len(logits), 1)), dim=1).scatter(1, places, -torch.inf)
    outside = torch.cat((outside[:, :-1], extra[:, None]), dim=1)
    tail = tau.masked_fill(whole, 0.0) * (torch.logsumexp(outside, dim=-1) - log_normalizer)
    return _head_loss(logits, teacher_ids.clamp(min=0), p, log_normalizer) - tail


def _present(teacher_ids: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which ids [T, K] are in S, and the rows [T] where S is the whole draft vocabulary."""
    present = teacher_ids >= 0
    return present, present.sum(-1) == vocab_size


def _head_loss(
    logits: torch.Tensor, teacher_ids: torch.Tensor, p: torch.Tensor, log_normalizer: torch.Tensor
) -> torch.Tensor:
    return -(p * (logits.gather(1, teacher_ids) - log_normalizer[:, None])).sum(-1)


class _FusedTailBucketLoss(torch.autograd.Function):
    """The gradient is made in the forward pass, in the buffer that held the exponentials.

    With Z = sum exp(z), R = the part of it outside S and c = sum_S p + tau: dL/dz_j = q_j c - tau exp(z_j) / R
    outside S, and q_i c - p_i inside.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, teacher_ids: torch.Tensor, p: torch.Tensor, tau: torch.Tensor, absent: bool
    ) -> torch.Tensor:
        largest = logits.amax(-1, keepdim=True)
        gradient = torch.sub(logits, largest).exp_()
        if absent:  # stand-ins for absent ids are id 0, which may be in S too: they must change nothing there
            present, whole = _present(teacher_ids, logits.shape[1])
            teacher_ids, tau = teacher_ids.clamp(min=0), tau.masked_fill(whole, 0.0)
            zeros = torch.full_like(p, torch.inf, dtype=logits.dtype).masked_fill_(present, 0.0)
            gradient.scatter_reduce_(1, teacher_ids, zeros, "amin")
        else:
            gradient.scatter_(1, teacher_ids, 0.0)
        inside_logits = logits.gather(1, teacher_ids) - largest
        inside = inside_logits.exp()
        if absent:
            inside = inside.masked_fill_(~present, 0.0)
        # Below the smallest normal number the tail has no digits left; log(0) would poison the batch.
        rest = gradient.sum(-1).clamp_(min=torch.finfo(logits.dtype).tiny)
        normalizer = rest + inside.sum(-1)
        head = (p * (inside_logits - normalizer.log()[:, None])).sum(-1)
        total = p.sum(-1) + tau
        gradient.mul_((total / normalizer - tau / rest)[:, None])
        values = inside * (total / normalizer)[:, None] - p  # 0 for what is absent; S holds 0 until here
        gradient = (
            gradient.scatter_add_(1, teacher_ids, values) if absent else gradient.scatter_(1, teacher_ids, values)
        )
        ctx.save_for_backward(gradient)
        return -head - tau * (rest.log() - normalizer.log())

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None], None, None, None, None


def fused_tail_bucket_loss(
    logits: torch.Tensor, teacher_ids: torch.Tensor, p: torch.Tensor, tau: torch.Tensor, *, absent: bool = False
) -> torch.Tensor:
    """`tail_bucket_loss` in half the passes over [T, V], for constant teachers. Its backward runs once.

    `absent` False promises that no id is -1.
    """
    if not absent and teacher_ids.shape[1] == logits.shape[1]:
        return _head_loss(logits, teacher_ids, p, torch.logsumexp(logits, dim=-1))
    return _FusedTailBucketLoss.apply(logits, teacher_ids, p, tau, absent)  # type: ignore[no-any-return, no-untyped-call]
