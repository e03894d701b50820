"""The loss of a batch: how the losses of rows are weighted and averaged, whatever draft made the logits.

A draft gives a `StepOutput` for each of its steps (an unroll step of a chain, a slot of a block) and logits for the
rows of an output. The loss of one row is in `row_losses`.

The teacher over the draft vocabulary D is `p_i = exp(z_i - log_z_draft)` for the stored entries, and the tail mass
`tau = 1 - sum p_i`, which is exact because log_z_draft is. Where a store holds final-norm states, p is known over all
of D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.data.batches import Batch
from draftcache.draft_train.data.teacher import exact_probabilities
from draftcache.draft_train.loss.d_pace import d_pace_weights
from draftcache.draft_train.loss.row_losses import RowTeacher, acceptance, find_loss
from draftcache.store.format.head_form import IDENTITY, HeadForm


@dataclass(frozen=True)
class StepOutput:
    """The output of a draft at step `number`: which start rows took part, and the states that its head reads."""

    number: int
    rows: Tensor
    """[A] int64 into the batch's start rows: those with `steps > number`."""
    hidden: Tensor
    """[A, H]."""

    def take(self, chosen: Tensor | slice) -> StepOutput:
        """Return the output of some of these rows."""
        return StepOutput(self.number, self.rows[chosen], self.hidden[chosen])


Logits = Callable[[StepOutput], Tensor]
"""Returns the draft-vocabulary logits [A, V] of an output's rows."""
Confidence = Callable[[StepOutput], Tensor | None]
"""Returns logits [A] of the probability that the proposals of an output's rows are accepted; None from drafts without.
"""


def needs_text(config: TrainConfig) -> bool:
    """Return whether a loss under these settings reads the tokens of the text, `Batch.next_tokens`."""
    return config.step_weights == "d-pace" or find_loss(config.loss).needs_text


def teacher_probabilities(teacher_logits: Tensor, log_z_draft: Tensor) -> tuple[Tensor, Tensor]:
    """Return p [T, K] and tau [T] for stored logits [T, K] and log_z_draft [T].

    Rounding may make tau negative, so it is clipped at 0. The logit of an absent entry is -inf, and its p is 0.
    """
    p = torch.exp(teacher_logits - log_z_draft[:, None])
    return p, (1.0 - p.sum(-1)).clamp(min=0.0)


def draft_mass(batch: Batch, teacher_rows: Tensor) -> Tensor:
    """Return p(D) = exp(log_z_draft - log_z_full) [T], the verifier's probability of the whole draft vocabulary."""
    return torch.exp(batch.log_z_draft[teacher_rows] - batch.log_z_full[teacher_rows]).clamp(max=1.0)


def row_weights(mode: str, batch: Batch, teacher_rows: Tensor, in_draft: Tensor) -> Tensor:
    """Return the weight [T] float32 of each row's loss, for rows with the teacher rows [T] int64, by `mode`.

    "weight": p(D), the most probability that the draft can win there.
    "drop": 0 where the verifier's argmax is outside D (`in_draft` [V] bool), else 1.
    "keep": 1.
    """
    if mode == "weight":
        return draft_mass(batch, teacher_rows)
    if mode == "drop":
        return in_draft[batch.argmax[teacher_rows]].to(torch.float32)
    return torch.ones(teacher_rows.shape[0], device=teacher_rows.device)


def row_means(batch: Batch, rows: Tensor) -> Tensor:
    """Return the weight [T] float32 of each start row `rows` [T] int64 of one step in its conversation's mean."""
    if batch.pair_weight is not None:
        return batch.pair_weight[rows]
    conversation = batch.conversation[rows]
    return 1.0 / torch.bincount(conversation, minlength=batch.conversations)[conversation]


@dataclass(frozen=True)
class ObjectiveResult:
    """The loss of a batch and the figures that are logged. All are sums, so that micro-batches and ranks add up.

    No method waits for the device.
    """

    loss: Tensor
    """[]: the batch's share of the loss; may be detached."""
    rows: Tensor
    """[steps] loss rows of each step. Like all tensors below it is float32 or float64, on the loss's device."""
    losses: Tensor
    """[steps] sums of the rows' losses, unweighted."""
    hits: Tensor
    """[steps] rows whose draft argmax is the verifier's; an argmax outside the draft vocabulary is a miss."""
    tail_mass: Tensor
    """[] sum of tau; 0 where states are stored, which leave nothing out."""
    tail_positions: Tensor
    """[] teacher positions that tau is summed over."""

    @classmethod
    def zeros(cls, steps: int, device: torch.device) -> ObjectiveResult:
        """Return the result of no batch at all."""
        return cls.unpack(torch.zeros(3 * steps + 3, dtype=torch.float64, device=device))

    @classmethod
    def unpack(cls, values: Tensor) -> ObjectiveResult:
        """Return the result whose `packed()` is `values`."""
        rows, losses, hits = values[3:].view(3, -1)
        return cls(loss=values[0], tail_mass=values[1], tail_positions=values[2], rows=rows, losses=losses, hits=hits)

    def packed(self) -> Tensor:
        """Return all values as one tensor [3 * steps + 3] float64, detached, to add up or to copy."""
        scalars = torch.stack([value.detach().double() for value in (self.loss, self.tail_mass, self.tail_positions)])
        return torch.cat([scalars, *(value.detach().double() for value in (self.rows, self.losses, self.hits))])

    def __add__(self, other: ObjectiveResult) -> ObjectiveResult:
        """Return the sums of both results, detached."""
        return self.unpack(self.packed() + other.packed())


class Objective:
    """The loss of a batch: per step, the mean over each conversation's rows, times the batch's `loss_share`.

    Step k weighs `step_decay ** k`.
    """

    def __init__(
        self,
        config: TrainConfig,
        target_ids: Tensor,
        in_draft: Tensor,
        verifier_head: Tensor | None = None,
        head_form: HeadForm = IDENTITY,
    ) -> None:
        """`target_ids` [D] int64 maps draft ids to verifier ids; `in_draft` [V] bool marks those verifier ids.

        `verifier_head` [D, H], the vocabulary's rows of the verifier's head, makes the teacher of batches that hold
        final-norm states, with the scale and cap of `head_form`. Raises InputError for a loss of an unknown name.
        """
        self.config = config
        self.target_ids = target_ids
        self.in_draft = in_draft
        self.verifier_head = verifier_head
        self.head_form = head_form
        self.loss = find_loss(config.loss)
        self.draft_ids = torch.full((in_draft.shape[0],), -1, device=target_ids.device)
        """[V] int64: the draft id of each verifier id, -1 outside the draft vocabulary."""
        self.draft_ids[target_ids] = torch.arange(target_ids.shape[0], device=target_ids.device)

    def __call__(
        self, outputs: Iterable[StepOutput], logits: Logits, batch: Batch, confidence: Confidence | None = None
    ) -> ObjectiveResult:
        """Add up the loss over a draft's outputs. Autograd reaches the draft through them and through `logits`.

        Where `confidence` says something, its binary cross entropy to alpha (see `row_losses`), which gets no gradient
        here, is added to every row's loss, with the row's weight.
        """
        device, steps = batch.taps.device, batch.step_tokens.shape[1]
        paces: Tensor | None = None
        if self.config.step_weights == "d-pace":
            outputs = list(outputs)
            paces = d_pace_weights(self._realised(outputs, logits, batch))
        total = torch.zeros((), device=device)
        sums = torch.zeros(3, steps, dtype=torch.float64, device=device)
        for output in outputs:
            teacher_rows = batch.teacher_index[output.rows, output.number]
            if batch.pair_weight is not None:  # some rows may carry no loss at this step
                carries = torch.nonzero(teacher_rows >= 0)[:, 0]
                output, teacher_rows = output.take(carries), teacher_rows[carries]
            losses, hits = self._rows(logits, batch, output, teacher_rows)
            weight = row_weights(self.config.out_of_vocab, batch, teacher_rows, self.in_draft)
            weight = weight * row_means(batch, output.rows)
            pace = self.config.step_decay**output.number if paces is None else paces[output.rows, output.number]
            weight = weight * pace * batch.loss_share
            total = total + (losses * weight).sum()
            if confidence is not None and (said := confidence(output)) is not None:
                total = total + (self._confidence_losses(said, logits, batch, output, teacher_rows) * weight).sum()
            sums[0, output.number] = teacher_rows.numel()
            sums[1, output.number] = losses.detach().sum()
            sums[2, output.number] = hits.sum()
        tail_mass, tail_positions = tail_sums(batch)
        return ObjectiveResult(
            loss=total,
            rows=sums[0],
            losses=sums[1],
            hits=sums[2],
            tail_mass=tail_mass,
            tail_positions=tail_positions,
        )

    def _rows(self, logits: Logits, batch: Batch, output: StepOutput, teacher_rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses [T] and hits [T] bool, computed in slices of `loss_chunk` rows.

        With several slices, logits (the verifier's too) are recomputed in the backward pass, so that at most one
        slice of them is alive.
        """

        def one(hidden: Tensor, rows: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
            return self.row_losses(logits(StepOutput(output.number, rows, hidden)), batch, chosen)

        size = self.config.loss_chunk
        if teacher_rows.numel() <= size:
            return one(output.hidden, output.rows, teacher_rows)
        slices = [slice(first, first + size) for first in range(0, teacher_rows.numel(), size)]
        parts = [
            checkpoint(one, output.hidden[part], output.rows[part], teacher_rows[part], use_reentrant=False)
            for part in slices
        ]
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    @torch.no_grad()
    def _realised(self, outputs: Iterable[StepOutput], logits: Logits, batch: Batch) -> Tensor:
        """Return `realised` of `d_pace_weights`."""
        found = torch.full(batch.step_tokens.shape, -1.0, dtype=torch.float32, device=batch.taps.device)
        for output in outputs:
            for first in range(0, output.rows.shape[0], self.config.loss_chunk):
                part = output.take(slice(first, first + self.config.loss_chunk))
                teacher_rows = batch.teacher_index[part.rows, part.number]
                found[part.rows, part.number] = self.realised_probability(logits(part), batch, teacher_rows)
        return found

    def realised_probability(self, logits: Tensor, batch: Batch, teacher_rows: Tensor) -> Tensor:
        """Return the probability [T] float32 that draft logits [T, V] give to the tokens that the text has next.

        It is 0 for tokens outside the draft vocabulary.
        """
        ids = self._text_ids(batch, teacher_rows)
        assert ids is not None, "the batch was asked for with its text"
        log_q = logits.float().gather(1, ids.clamp(min=0)[:, None])[:, 0] - torch.logsumexp(logits.float(), dim=-1)
        return torch.where(ids >= 0, log_q.exp(), 0.0)

    def _text_ids(self, batch: Batch, teacher_rows: Tensor) -> Tensor | None:
        return None if batch.next_tokens is None else self.draft_ids[batch.next_tokens[teacher_rows]]

    def _confidence_losses(
        self, said: Tensor, logits: Logits, batch: Batch, output: StepOutput, teacher_rows: Tensor
    ) -> Tensor:
        """Return the losses [T] of the confidence `said` [T] in an output's rows, whose teacher rows are [T] int64."""
        targets = []
        for first in range(0, teacher_rows.numel(), self.config.loss_chunk):
            rows = slice(first, first + self.config.loss_chunk)
            with torch.no_grad():
                targets.append(self.acceptance(logits(output.take(rows)), batch, teacher_rows[rows]))
        return F.binary_cross_entropy_with_logits(said, torch.cat(targets).to(said.dtype), reduction="none")

    def acceptance(self, logits: Tensor, batch: Batch, teacher_rows: Tensor) -> Tensor:
        """Return alpha [T] (see `row_losses`) of draft logits [T, V] for the teacher rows [T] int64."""
        return acceptance(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), self.row_teacher(batch, teacher_rows)
        )

    def row_losses(self, logits: Tensor, batch: Batch, teacher_rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses [T] and hits [T] bool of draft logits [T, V] for the teacher rows [T] int64."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        hits = self.target_ids[logits.detach().argmax(-1)] == batch.argmax[teacher_rows]
        return self.loss.function(logits, self.row_teacher(batch, teacher_rows)), hits

    def row_teacher(self, batch: Batch, teacher_rows: Tensor) -> RowTeacher:
        """Return the teacher over the draft vocabulary in the teacher rows [T] int64."""
        mass, text = draft_mass(batch, teacher_rows), self._text_ids(batch, teacher_rows)
        if batch.teacher_hidden is not None:
            assert self.verifier_head is not None, "the trainer gives it where a store holds states"
            states = batch.teacher_hidden[teacher_rows]
            p = exact_probabilities(states, self.verifier_head, self.head_form)
            return RowTeacher(None, p, mass=mass, realised=text)
        p, tau = teacher_probabilities(batch.teacher_logits[teacher_rows], batch.log_z_draft[teacher_rows])
        return RowTeacher(batch.teacher_ids[teacher_rows], p, tau, mass, batch.absent_entries, text)


def tail_sums(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the sum of tau over the batch's teacher positions, and the number of these, both [] float64."""
    positions = torch.full((), batch.argmax.shape[0], dtype=torch.float64, device=batch.argmax.device)
    if batch.teacher_hidden is not None:
        return torch.zeros_like(positions), positions
    return teacher_probabilities(batch.teacher_logits, batch.log_z_draft)[1].double().sum(), positions
