"""Losses of one row: draft logits over the draft vocabulary D against a teacher whose largest entries are stored.

The teacher is `p_i` for the stored entries S, and the tail mass `tau = 1 - sum_S p_i`, which is exact because log Z is
stored. The draft is `q = softmax(logits)`, and its tail is `1 - sum_S q_i`. S and the tail are |S| + 1 outcomes.

- `tail-kl`, the default: `-sum_S p_i log q_i - tau log(1 - sum_S q_i)`, cross entropy over these outcomes. The head and
  the total tail are exact; only the shape inside the tail is not, so the gradient is off by at most 2 tau in L1. The
  loss equals the KL divergence up to the teacher's own entropy, which has no gradient.
- `renormalized-kl`: `-sum_S p_i / (1 - tau) log q_i`, as in trainers that keep a top-k without its log Z. It is there
  for comparison with them. Its gradient is biased by exactly 2 tau in L1: the draft learns that the tail is impossible.
- `tv`: `1 - alpha` with `alpha = sum_S min(m p_i, q_i) + min(m tau, 1 - sum_S q_i)`, where m = p(D) is the verifier's
  probability of the whole draft vocabulary. Over all single outcomes alpha is the share of drafted tokens that
  speculative sampling accepts, and 1 - alpha the total variation distance (Leviathan et al., arXiv 2211.17192). With
  the tail as one outcome, alpha is at most min(m tau, 1 - sum_S q_i) too large.
- `lk`: `lambda KL + (1 - lambda)(1 - alpha)` with `lambda = exp(-3 alpha)`, through which no gradient flows, and the
  KL over D of `tail-kl`: the hybrid of Samarin et al., "LK Losses", arXiv 2602.23881, sections 4.2 and 4.4, with the
  rate that they found best. KL leads while the draft is far off, where the gradient of alpha vanishes. The paper takes
  lambda from the mean alpha of an unroll step's rows; here it is the alpha of the row itself, so that a row's loss
  depends on no other row, whichever slice, pack or rank that row is in.
- `ce`: `-log q_x` of the token x that the text has next, whatever the teacher holds of it. It is the loss of trainers
  that keep no teacher. Rows whose x is outside the draft vocabulary have a loss of 0.
- `ce-l1`: `0.1 ce + 0.9 L1(p, q)`, the objective of DSpark (DeepSpec's published settings). The L1 distance over the
  verifier's vocabulary is `2 (1 - alpha)` with the alpha of `tv`.
- `lk-alpha`: `-log alpha`, the same paper's likelihood of acceptance: the gradient is that of `tv`, times 1 / alpha.

Entries that are absent (id -1) are not in S. Where S is empty, tau = 1 and nothing has a gradient; where S is all of D,
there is no tail, and tau counts as 0, whatever rounding made of it. Where p is known over all of D, S is D.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from draftcache.draft_train.loss.kernels.ce_l1 import CROSS_ENTROPY, DISTANCE, ce_l1
from draftcache.draft_train.loss.kernels.tail_kl import tail_kl
from draftcache.draft_train.loss.tail_bucket import fused_tail_bucket_loss, head_loss
from draftcache.store.common.errors import InputError
from draftcache.store.common.triton_launch import runs_kernels

LK_DECAY = 3.0
"""lambda = exp(-LK_DECAY alpha)."""


@dataclass(frozen=True)
class RowTeacher:
    """The teacher of T rows over the draft vocabulary. No gradient flows into it."""

    ids: torch.Tensor | None
    """[T, K] int64 draft-vocabulary ids, -1 where an entry is absent. None: p is over all V ids, in order."""
    p: torch.Tensor
    """[T, K], or [T, V] without ids; 0 where an entry is absent."""
    tau: torch.Tensor | None = None
    """[T] tail mass; None without ids, as nothing is left out there."""
    mass: torch.Tensor | None = None
    """[T] the verifier's probability of the whole draft vocabulary; None counts as 1."""
    absent: bool = True
    """Whether an id may be -1. False promises that none is, which saves passes over [T, V]."""
    realised: torch.Tensor | None = None
    """[T] int64 draft id of the token that the text has next, -1 where it is outside the draft vocabulary. None where
    the batch has no `next_tokens`."""


Kernel = Callable[[torch.Tensor, RowTeacher, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""What `Loss.weighted_gradient` does, for teachers with ids, on devices that run kernels. It may overwrite the logits.
"""


@dataclass(frozen=True)
class Loss:
    """A loss of a row: its name on the command line, its definition, and a kernel where there is one."""

    name: str
    function: Callable[[torch.Tensor, RowTeacher], torch.Tensor]
    """Float32 draft logits [T, V] and their teacher -> losses [T]. Only the logits get a gradient."""
    needs_text: bool = False
    """Whether it reads `RowTeacher.realised`."""
    kernel: Kernel | None = None
    """Computes losses and gradients in one pass; None: autograd goes through `function`."""

    def has_kernel(self, logits: torch.Tensor, states: bool) -> bool:
        """Return whether a kernel serves these logits; `states` says that the teacher is known over all ids."""
        return self.kernel is not None and not states and runs_kernels(logits)

    def weighted_gradient(
        self, logits: torch.Tensor, teacher: RowTeacher, weight: torch.Tensor, out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return losses [T] and argmax [T] int64 of float32 logits [T, V], which may be overwritten.

        `out` [T, V] receives `weight * d loss / d logits` in its dtype; `weight` is [T].
        """
        if self.has_kernel(logits, teacher.ids is None):
            assert self.kernel is not None
            return self.kernel(logits, teacher, weight, out)
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            losses = self.function(leaf, teacher)
            (gradient,) = torch.autograd.grad(losses, leaf, weight.to(losses.dtype))
        out.copy_(gradient)
        return losses.detach(), logits.argmax(-1)


def find_loss(name: str) -> Loss:
    """Return the loss of this name. Raises InputError, which names all losses, where there is none."""
    if name not in LOSSES:
        raise InputError(f"--loss: expected one of {list(LOSSES)}, found {name!r}")
    return LOSSES[name]


def tail_kl_loss(logits: torch.Tensor, teacher: RowTeacher) -> torch.Tensor:
    """Return the loss `tail-kl` [T]. Without ids it is the cross entropy over the whole draft vocabulary."""
    if teacher.ids is None:
        return F.cross_entropy(logits, teacher.p.to(logits.dtype), reduction="none")
    assert teacher.tau is not None, "stored entries come with their tail"
    return fused_tail_bucket_loss(logits, teacher.ids, teacher.p, teacher.tau, absent=teacher.absent)


def _tail_kl_kernel(
    logits: torch.Tensor, teacher: RowTeacher, weight: torch.Tensor, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    assert teacher.ids is not None
    assert teacher.tau is not None, "stored entries come with their tail"
    return tail_kl(logits, teacher.ids, teacher.p, teacher.tau, weight, out)


def renormalized_loss(logits: torch.Tensor, teacher: RowTeacher) -> torch.Tensor:
    """Return the loss `renormalized-kl` [T]: cross entropy to the stored entries, scaled to sum 1; 0 if none exist."""
    p = teacher.p
    p = p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    if teacher.ids is None:
        return F.cross_entropy(logits, p.to(logits.dtype), reduction="none")
    return head_loss(logits, teacher.ids.clamp(min=0), p, torch.logsumexp(logits, dim=-1))


def tv_loss(logits: torch.Tensor, teacher: RowTeacher) -> torch.Tensor:
    """Return the loss `tv` [T]."""
    return 1.0 - acceptance(logits, teacher)


def ce_loss(logits: torch.Tensor, teacher: RowTeacher) -> torch.Tensor:
    """Return the loss `ce` [T]."""
    assert teacher.realised is not None, "the batch was asked for with its text"
    return F.cross_entropy(logits, teacher.realised, ignore_index=-1, reduction="none")


def ce_l1_loss(logits: torch.Tensor, teacher: RowTeacher) -> torch.Tensor:
    """Return the loss `ce-l1` [T]."""
    return CROSS_ENTROPY * ce_loss(logits, teacher) + DISTANCE * 2.0 * tv_loss(logits, teacher)


def _ce_l1_kernel(
    logits: torch.Tensor, teacher: RowTeacher, weight: torch.Tensor, out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    assert teacher.ids is not None
    assert teacher.tau is not None, "stored entries come with their tail"
    assert teacher.realised is not None, "the batch was asked for with its text"
    mass = torch.ones_like(teacher.tau) if teacher.mass is None else teacher.mass
    p = (teacher.p * mass[:, None]).contiguous()
    return ce_l1(logits, teacher.ids, p, teacher.tau * mass, teacher.realised, weight, out)


def lk_loss(logits: torch.Tensor, teacher: RowTeacher) -> torch.Tensor:
    """Return the loss `lk` [T]."""
    alpha = acceptance(logits, teacher)
    kl = tail_kl_loss(logits, teacher) + _negative_entropy(teacher)
    blend = torch.exp(-LK_DECAY * alpha.detach())
    return blend * kl + (1.0 - blend) * (1.0 - alpha)


def lk_alpha_loss(logits: torch.Tensor, teacher: RowTeacher) -> torch.Tensor:
    """Return the loss `lk-alpha` [T]. Below the smallest normal number alpha has no digits, and its gradient no use."""
    alpha = acceptance(logits, teacher)
    return -alpha.clamp(min=torch.finfo(alpha.dtype).tiny).log()


def acceptance(logits: torch.Tensor, teacher: RowTeacher) -> torch.Tensor:
    """Return alpha [T] of draft logits [T, V], with the tail as one outcome."""
    q = torch.softmax(logits, dim=-1)
    mass = logits.new_ones(len(logits)) if teacher.mass is None else teacher.mass.to(q.dtype)
    scaled = teacher.p.to(q.dtype) * mass[:, None]
    ids, tau = teacher.ids, teacher.tau
    if ids is None:
        return torch.minimum(scaled, q).sum(-1)
    assert tau is not None, "stored entries come with their tail"
    columns = torch.where(ids >= 0, ids, logits.shape[1])  # absent entries go to one more column, which is cut off
    outside = torch.ones(len(logits), logits.shape[1] + 1, dtype=torch.bool, device=logits.device)
    outside = outside.scatter_(1, columns, False)[:, :-1]
    tail = q.masked_fill(~outside, 0.0).sum(-1)  # 1 - sum q would cancel
    head = torch.minimum(scaled, q.gather(1, ids.clamp(min=0)))  # p is 0 where an entry is absent
    return head.sum(-1) + torch.minimum(tau.to(q.dtype) * mass, tail)


def _negative_entropy(teacher: RowTeacher) -> torch.Tensor:
    known = torch.xlogy(teacher.p, teacher.p).sum(-1)
    return known if teacher.tau is None else known + torch.xlogy(teacher.tau, teacher.tau)


LOSSES = {
    loss.name: loss
    for loss in (
        Loss("tail-kl", tail_kl_loss, kernel=_tail_kl_kernel),
        Loss("renormalized-kl", renormalized_loss),
        Loss("tv", tv_loss),
        Loss("lk", lk_loss),
        Loss("lk-alpha", lk_alpha_loss),
        Loss("ce", ce_loss, needs_text=True),
        Loss("ce-l1", ce_l1_loss, needs_text=True, kernel=_ce_l1_kernel),
    )
}
"""Every loss by its name."""
