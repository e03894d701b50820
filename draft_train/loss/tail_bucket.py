"""The tail-bucket loss: cross entropy over the teacher's stored entries and one outcome for everything else.

With the stored entries S, their probabilities `p_i`, the teacher's tail mass `tau = 1 - sum_S p_i` and the draft's
`q = softmax(logits)`, the loss of a row is `-sum_S p_i log q_i - tau log(1 - sum_S q_i)`. An id of -1 marks an absent
entry, which is not in S. Where S is the whole draft vocabulary there is no tail, and tau counts as 0.
"""

from __future__ import annotations

from typing import Any

import torch


def head_loss(
    logits: torch.Tensor, teacher_ids: torch.Tensor, p: torch.Tensor, log_normalizer: torch.Tensor
) -> torch.Tensor:
    """Return `-sum_S p_i log q_i` [T] for logits [T, V], ids [T, K] int64 >= 0, p [T, K] and log-sum-exps [T]."""
    return -(p * (logits.gather(1, teacher_ids) - log_normalizer[:, None])).sum(-1)


def tail_bucket_loss(
    logits: torch.Tensor, teacher_ids: torch.Tensor, p: torch.Tensor, tau: torch.Tensor
) -> torch.Tensor:
    """Plain twin of `fused_tail_bucket_loss`: the loss [T] of draft logits [T, V], for autograd.

    `teacher_ids` [T, K] int64, `p` [T, K], `tau` [T]. Ids are distinct, or -1 where p is 0. The tail's log-probability
    is a log-sum-exp over the entries outside S instead of log(1 - sum q), which cancels.
    """
    log_normalizer = torch.logsumexp(logits, dim=-1)
    # Absent entries go to one more column. It is no outcome, but it keeps the sum above 0 where S is everything.
    present, whole = _present(teacher_ids, logits.shape[1])
    extra = torch.full_like(whole, -torch.inf, dtype=logits.dtype).masked_fill(whole, 0.0)
    columns = torch.where(present, teacher_ids, logits.shape[1])
    outside = torch.cat((logits, logits.new_zeros(len(logits), 1)), dim=1).scatter(1, columns, -torch.inf)
    outside = torch.cat((outside[:, :-1], extra[:, None]), dim=1)
    tail = tau.masked_fill(whole, 0.0) * (torch.logsumexp(outside, dim=-1) - log_normalizer)
    return head_loss(logits, teacher_ids.clamp(min=0), p, log_normalizer) - tail


def _present(teacher_ids: torch.Tensor, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which ids are in S, [T, K] bool, and for which rows S is the whole draft vocabulary, [T] bool."""
    present = teacher_ids >= 0
    return present, present.sum(-1) == vocab_size


class _FusedTailBucketLoss(torch.autograd.Function):
    """Computes the gradient in the forward pass already, in the buffer that holds the exponentials.

    With Z = sum exp(z), R = the part of Z outside S and c = sum_S p + tau, the gradient dL/dz_j is
    q_j c - tau exp(z_j) / R outside S, and q_j c - p_j inside S.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, teacher_ids: torch.Tensor, p: torch.Tensor, tau: torch.Tensor, absent: bool
    ) -> torch.Tensor:
        largest = logits.amax(-1, keepdim=True)
        gradient = torch.sub(logits, largest).exp_()
        if absent:  # absent ids become id 0, which may be in S itself, so they must not change anything there
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
        # Below the smallest normal number the tail has no digits left, and log(0) would make the whole loss NaN.
        rest = gradient.sum(-1).clamp_(min=torch.finfo(logits.dtype).tiny)
        normalizer = rest + inside.sum(-1)
        head = (p * (inside_logits - normalizer.log()[:, None])).sum(-1)
        total = p.sum(-1) + tau
        gradient.mul_((total / normalizer - tau / rest)[:, None])
        values = inside * (total / normalizer)[:, None] - p  # 0 where absent; in S the gradient is 0 so far
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
    """Return what `tail_bucket_loss` returns, in half the passes over [T, V]. The teacher gets no gradient.

    `absent` False promises that no id is -1. The backward pass can run only once.
    """
    if not absent and teacher_ids.shape[1] == logits.shape[1]:
        return head_loss(logits, teacher_ids, p, torch.logsumexp(logits, dim=-1))
    return _FusedTailBucketLoss.apply(logits, teacher_ids, p, tau, absent)  # type: ignore[no-any-return, no-untyped-call]
