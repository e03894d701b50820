"""The loss over the draft vocabulary, and its average over loss-carrying rows.

Teacher over the draft vocabulary D: `p_i = exp(z_i - log_z_draft)` for the stored entries S, and the tail mass
`tau = 1 - sum_S p_i`, which is exact because log_z_draft is. The loss of a row is
`-sum_S p_i log q_i - tau log(1 - sum_S q_i)`: cross entropy over |S| + 1 outcomes. Head and total tail are exact;
only the shape inside the tail is not, so the gradient is off by at most 2 tau in L1. It equals the KL divergence
up to the teacher's own entropy, which has no gradient. Entries that are absent (id -1) are not in S; where S is
empty, tau = 1 and the loss is 0; where S is all of D, there is no tail and tau counts as 0, whatever rounding left.

Where final-norm states are stored, p is known over all of D, and the loss is the cross entropy `-sum_D p_i log q_i`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from draft_train.batches import Batch
from draft_train.config import TrainConfig
from draft_train.draft_model import DraftModel
from draft_train.teacher import exact_probabilities
from draft_train.unroll import unroll


def teacher_probabilities(teacher_logits: torch.Tensor, log_z_draft: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored logits [T, K] and log_z_draft [T] -> p [T, K] and tau [T], which is clipped at 0 against rounding.

    An absent entry's logit is -inf, and its p is 0.
    """
    p = torch.exp(teacher_logits - log_z_draft[:, None])
    return p, (1.0 - p.sum(-1)).clamp(min=0.0)


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


def exact_loss(logits: torch.Tensor, hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Cross entropy [T] of draft logits [T, D] to the verifier's distribution over D.

    `hidden` [T, H]: its final-norm states; `head` [D, H]: the draft vocabulary's rows of its head.
    """
    return F.cross_entropy(logits, exact_probabilities(hidden, head).to(logits.dtype), reduction="none")


def row_weights(mode: str, batch: Batch, places: torch.Tensor, in_draft: torch.Tensor) -> torch.Tensor:
    """Weight of each row [T] whose teacher stands at `places` [T].

    "weight": p(D) = exp(log_z_draft - log_z_full), all the probability that the draft can win there;
    "drop": 0 where the verifier's argmax is outside D (`in_draft` [V] bool), else 1; "keep": 1.
    """
    if mode == "weight":
        return torch.exp(batch.log_z_draft[places] - batch.log_z_full[places]).clamp(max=1.0)
    if mode == "drop":
        return in_draft[batch.argmax[places]].to(torch.float32)
    return torch.ones(places.shape[0], device=places.device)


@dataclass(frozen=True)
class ObjectiveResult:
    """Loss and what to log, all of it sums, so that micro-batches and ranks add up. Nothing waits for the device."""

    loss: torch.Tensor
    """[]: the batch's share of the loss; may be detached."""
    rows: torch.Tensor
    """[ttt_steps] loss rows of each unroll step; like all below float32 or float64, on the loss's device."""
    losses: torch.Tensor
    """[ttt_steps] their losses, unweighted."""
    hits: torch.Tensor
    """[ttt_steps] those whose draft argmax is the verifier's; an argmax outside the draft vocabulary is a miss."""
    tail_mass: torch.Tensor
    """[] of tau; 0 where states are stored, which leave nothing out."""
    tail_positions: torch.Tensor
    """[] teacher positions that tau is summed over."""

    @classmethod
    def zeros(cls, steps: int, device: torch.device) -> ObjectiveResult:
        """Of no batch at all."""
        return cls.unpack(torch.zeros(3 * steps + 3, dtype=torch.float64, device=device))

    @classmethod
    def unpack(cls, values: torch.Tensor) -> ObjectiveResult:
        """What `packed` made."""
        rows, losses, hits = values[3:].view(3, -1)
        return cls(loss=values[0], tail_mass=values[1], tail_positions=values[2], rows=rows, losses=losses, hits=hits)

    def packed(self) -> torch.Tensor:
        """[3 * ttt_steps + 3] float64, detached: one tensor to add up or to copy."""
        scalars = torch.stack([value.detach().double() for value in (self.loss, self.tail_mass, self.tail_positions)])
        return torch.cat([scalars, *(value.detach().double() for value in (self.rows, self.losses, self.hits))])

    def __add__(self, other: ObjectiveResult) -> ObjectiveResult:
        """Sums over both, detached."""
        return self.unpack(self.packed() + other.packed())


class Objective:
    """Loss of a batch: per step, the mean over each conversation's rows, times the batch's `loss_share`; step k weighs
    `step_decay ** k`.
    """

    def __init__(
        self,
        config: TrainConfig,
        target_ids: torch.Tensor,
        in_draft: torch.Tensor,
        verifier_head: torch.Tensor | None = None,
    ) -> None:
        """`target_ids` [D] int64 maps draft ids to verifier ids; `in_draft` [V] bool is its inverse's support.

        `verifier_head` [D, H], the vocabulary's rows, makes the teacher of batches that hold final-norm states.
        """
        self.config = config
        self.target_ids = target_ids
        self.in_draft = in_draft
        self.verifier_head = verifier_head

    def __call__(self, model: DraftModel, embeddings: torch.Tensor, batch: Batch) -> ObjectiveResult:
        """Unroll the draft over the batch and add up the loss."""
        device = batch.aux.device
        total = torch.zeros((), device=device)
        sums = torch.zeros(3, self.config.ttt_steps, dtype=torch.float64, device=device)
        for step in unroll(model, embeddings, batch, self.config.ttt_steps):
            places = batch.teacher_index[step.rows, step.number]
            losses, hits = self._rows(model, batch, step.hidden, places)
            conversation = batch.conversation[step.rows]
            counts = torch.bincount(conversation, minlength=batch.conversations)
            weight = row_weights(self.config.out_of_vocab, batch, places, self.in_draft) / counts[conversation]
            total = total + self.config.step_decay**step.number * (losses * weight).sum() * batch.loss_share
            sums[0, step.number] = places.numel()
            sums[1, step.number] = losses.detach().sum()
            sums[2, step.number] = hits.sum()
        tail_mass, tail_positions = _tail_sums(batch)
        return ObjectiveResult(
            loss=total,
            rows=sums[0],
            losses=sums[1],
            hits=sums[2],
            tail_mass=tail_mass,
            tail_positions=tail_positions,
        )

    def _rows(
        self, model: DraftModel, batch: Batch, hidden: torch.Tensor, places: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss [T] and hits [T] in slices of `loss_chunk` rows; with several slices, logits (the verifier's too) are
        recomputed in the backward pass, so that at most one slice of them is alive.
        """

        def one(hidden: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = model.logits(hidden)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            hits = self.target_ids[logits.detach().argmax(-1)] == batch.argmax[places]
            if batch.teacher_hidden is not None:
                assert self.verifier_head is not None, "the trainer gives it where a store holds states"
                return exact_loss(logits, batch.teacher_hidden[places], self.verifier_head), hits
            p, tau = teacher_probabilities(batch.teacher_logits[places], batch.log_z_draft[places])
            ids = batch.teacher_ids[places]
            return fused_tail_bucket_loss(logits, ids, p, tau, absent=batch.absent_entries), hits

        size = self.config.loss_chunk
        if places.numel() <= size:
            return one(hidden, places)
        slices = [slice(first, first + size) for first in range(0, places.numel(), size)]
        parts = [checkpoint(one, hidden[rows], places[rows], use_reentrant=False) for rows in slices]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _tail_sums(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of tau, and the positions it is summed over."""
    positions = torch.full((), batch.argmax.shape[0], dtype=torch.float64, device=batch.argmax.device)
    if batch.teacher_hidden is not None:
        return torch.zeros_like(positions), positions
    return teacher_probabilities(batch.teacher_logits, batch.log_z_draft)[1].double().sum(), positions
