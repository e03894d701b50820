"""The tail-bucket loss: cross entropy over the teacher's stored entries and one outcome for everything else.

With the stored entries S, their probabilities `p_i`, the teacher's tail mass `tau = 1 - sum_S p_i` and the draft's
`q = softmax(logits)`, the loss of a row is `-sum_S p_i log q_i - tau log(1 - sum_S q_i)`. Ids of -1 are absent: they
are not in S. Where S is the whole draft vocabulary there is no tail, and tau counts as 0.
"""

from __future__ import annotations

from typing import Any

import torch


def head_loss(
    logits: torch.Tensor, teacher_ids: torch.Tensor, p: torch.Tensor, log_normalizer: torch.Tensor
) -> torch.Tensor:
    """`-sum_S p_i log q_i` [T] of logits [T, V], ids [T, K] int64 >= 0, p [T, K] and log-sum-exp [T] of the logits."""
    return -(p * (logits.gather(1, teacher_ids) - log_normalizer[:, None])).sum(-1)


def tail_bucket_loss(
    logits: torch.Tensor, teacher_ids: torch.Tensor, p: torch.Tensor, tau: torch.Tensor
) -> torch.Tensor:
    """Per-row loss [T] of draft logits [T, V]; `teacher_ids` [T, K] int64, `p` [T, K], `tau` [T]. The plain twin.

    Ids are distinct or -1, where p is 0. The tail's log-probability is a log-sum-exp over the entries outside S, not
    log(1 - sum q), which cancels.
    """
    log_normalizer = torch.logsumexp(logits, dim=-1)
    # Absent entries go to one more column. It is no outcome, but it keeps the sum from 0 where no other one is left.
    present, whole = _present(teacher_ids, logits.shape[1])
    extra = torch.full_like(whole, -torch.inf, dtype=logits.dtype).masked_fill(whole, 0.0)
    columns = torch.where(present, teacher_ids, logits.shape[1])
    outside = torch.cat((logits, logits.new_zeros(len(logits), 1)), dim=1).scatter(1, columns, -torch.inf)
    outside = torch.cat((outside[:, :-1], extra[:, None]), dim=1)
    tail = tau.masked_fill(whole, 0.0) * (torch.logsumexp(outside, dim=-1) - log_normalizer)
    return head_loss(logits, teacher_ids.clamp(min=0), p, log_normalizer) - tail


def _present(teacher_ids: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which ids [T, K] are in S, and the rows [T] where S is the whole draft vocabulary."""
    present = teacher_ids >= 0
    return present, present.sum(-1) == vocab_size


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
        return head_loss(logits, teacher_ids, p, torch.logsumexp(logits, dim=-1))
    return _FusedTailBucketLoss.apply(logits, teacher_ids, p, tau, absent)  # type: ignore[no-any-return, no-untyped-call]
