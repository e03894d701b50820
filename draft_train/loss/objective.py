"""The loss of a batch: which rows carry loss and how they are averaged. `losses` has the loss of one row.

Teacher over the draft vocabulary D: `p_i = exp(z_i - log_z_draft)` for the stored entries, and the tail mass
`tau = 1 - sum p_i`, which is exact because log_z_draft is. Where final-norm states are stored, p is known over all of
D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.data.batches import Batch
from draftcache.draft_train.data.teacher import exact_probabilities
from draftcache.draft_train.drafts.eagle3.model import DraftModel
from draftcache.draft_train.drafts.eagle3.unroll import unroll
from draftcache.draft_train.loss.losses import row_loss


def teacher_probabilities(teacher_logits: torch.Tensor, log_z_draft: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Stored logits [T, K] and log_z_draft [T] -> p [T, K] and tau [T], which is clipped at 0 against rounding.

    An absent entry's logit is -inf, and its p is 0.
    """
    p = torch.exp(teacher_logits - log_z_draft[:, None])
    return p, (1.0 - p.sum(-1)).clamp(min=0.0)


def draft_mass(batch: Batch, places: torch.Tensor) -> torch.Tensor:
    """p(D) = exp(log_z_draft - log_z_full) [T]: the verifier's probability of the whole draft vocabulary."""
    return torch.exp(batch.log_z_draft[places] - batch.log_z_full[places]).clamp(max=1.0)


def row_weights(mode: str, batch: Batch, places: torch.Tensor, in_draft: torch.Tensor) -> torch.Tensor:
    """Weight of each row [T] whose teacher stands at `places` [T].

    "weight": p(D), all the probability that the draft can win there;
    "drop": 0 where the verifier's argmax is outside D (`in_draft` [V] bool), else 1; "keep": 1.
    """
    if mode == "weight":
        return draft_mass(batch, places)
    if mode == "drop":
        return in_draft[batch.argmax[places]].to(torch.float32)
    return torch.ones(places.shape[0], device=places.device)


def row_means(batch: Batch, rows: torch.Tensor) -> torch.Tensor:
    """Weight [T] float32 of each start row in `rows` [T], those of one step, in its conversation's mean."""
    if batch.pair_weight is not None:
        return batch.pair_weight[rows]
    conversation = batch.conversation[rows]
    return 1.0 / torch.bincount(conversation, minlength=batch.conversations)[conversation]


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
            rows, hidden = step.rows, step.hidden
            places = batch.teacher_index[rows, step.number]
            if batch.pair_weight is not None:  # there may be rows without loss at this step
                carries = torch.nonzero(places >= 0)[:, 0]
                rows, hidden, places = rows[carries], hidden[carries], places[carries]
            losses, hits = self._rows(model, batch, hidden, places)
            weight = row_weights(self.config.out_of_vocab, batch, places, self.in_draft) * row_means(batch, rows)
            total = total + self.config.step_decay**step.number * (losses * weight).sum() * batch.loss_share
            sums[0, step.number] = places.numel()
            sums[1, step.number] = losses.detach().sum()
            sums[2, step.number] = hits.sum()
        tail_mass, tail_positions = tail_sums(batch)
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
            return self.row_losses(model.logits(hidden), batch, places)

        size = self.config.loss_chunk
        if places.numel() <= size:
            return one(hidden, places)
        slices = [slice(first, first + size) for first in range(0, places.numel(), size)]
        parts = [checkpoint(one, hidden[rows], places[rows], use_reentrant=False) for rows in slices]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def row_losses(self, logits: torch.Tensor, batch: Batch, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss [T] and hits [T] bool of draft logits [T, V] whose teacher stands at `places` [T]."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        hits = self.target_ids[logits.detach().argmax(-1)] == batch.argmax[places]
        loss = row_loss(self.config.loss, absent=batch.absent_entries)
        mass = draft_mass(batch, places)
        if batch.teacher_hidden is not None:
            assert self.verifier_head is not None, "the trainer gives it where a store holds states"
            p = exact_probabilities(batch.teacher_hidden[places], self.verifier_head)
            return loss(logits, None, p, None, mass), hits
        p, tau = teacher_probabilities(batch.teacher_logits[places], batch.log_z_draft[places])
        return loss(logits, batch.teacher_ids[places], p, tau, mass), hits


def tail_sums(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of tau, and the positions it is summed over."""
    positions = torch.full((), batch.argmax.shape[0], dtype=torch.float64, device=batch.argmax.device)
    if batch.teacher_hidden is not None:
        return torch.zeros_like(positions), positions
    return teacher_probabilities(batch.teacher_logits, batch.log_z_draft)[1].double().sum(), positions
