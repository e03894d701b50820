"""Heads and loss of the fused pass over blocks: slice by slice of the rows that carry loss, with gradients at once.

Shape suffixes: S blocks, B slots, A rows with loss, H hidden, V draft vocabulary, M Markov rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draftcache.draft_train.data.batches import Batch
from draftcache.draft_train.drafts.block.fused_forward import BlockSlice
from draftcache.draft_train.drafts.block.fused_weights import BlockWeights
from draftcache.draft_train.kernels.norms import rms_norm_backward
from draftcache.draft_train.loss.d_pace import d_pace_weights
from draftcache.draft_train.loss.head_loss import HeadLoss
from draftcache.draft_train.loss.objective import Objective, ObjectiveResult, row_weights
from draftcache.store.common.products import add_product, float32_product


def batch_weights(batch: Batch, objective: Objective) -> Tensor:
    """Return the weight [S, steps] float32 of every (start row, step) pair in the loss of the batch, without its pace.

    It is 0 where the pair carries no loss. A pace is what the step itself weighs: `step_decay ** k`, or D-PACE.
    """
    steps = torch.arange(batch.step_tokens.shape[1], device=batch.steps.device)
    live = (batch.steps[:, None] > steps).to(torch.float32)
    counts = live.new_zeros(batch.conversations, live.shape[1]).index_add_(0, batch.conversation, live)
    weight = row_weights(objective.config.out_of_vocab, batch, batch.teacher_index.flatten(), objective.in_draft)
    return weight.view_as(live) * live / counts[batch.conversation].clamp(min=1.0) * batch.loss_share


@dataclass(frozen=True)
class _Rows:
    """The rows of a slice of blocks that carry loss."""

    slots: Tensor
    """[A] int64: rows of the slice's slot rows [S B]."""
    steps: Tensor
    """[A] int64."""
    blocks: Tensor
    """[A] int64: blocks of the slice."""
    teacher: Tensor
    """[A] int64: rows of the batch's teacher arrays."""
    before: Tensor
    """[A] int64: the tokens before those that are proposed."""

    def __getitem__(self, part: slice) -> _Rows:
        return _Rows(self.slots[part], self.steps[part], self.blocks[part], self.teacher[part], self.before[part])


class BlockHead:
    """Norm, heads and loss of block drafts."""

    def __init__(self, weights: BlockWeights, objective: Objective, slice_rows: int) -> None:
        """`slice_rows` is the number of rows whose logits exist at once."""
        self.weights, self.model, self.objective = weights, weights.model, objective
        self.loss = HeadLoss(objective, slice_rows)
        heads = (self.model.norm, self.model.lm_head, self.model.markov_head, self.model.confidence_head)
        self.parameters = [value for module in heads if module is not None for value in module.parameters()]
        """The parameters whose gradients are complete after the last slice's `backward`."""

    def backward(
        self, batch: Batch, part: BlockSlice, hidden: Tensor, weights: Tensor, result: ObjectiveResult
    ) -> Tensor:
        """Return the gradient [S B, H] of a slice's outputs `hidden` [S B, H], and add to `result` what it loses.

        `weights` [S, steps] are the `batch_weights` of the whole batch. Gradients of the heads are added to their
        buffers.
        """
        found = self._rows(batch, part)
        pace = self._paces(batch, part, hidden, found)
        upstream = torch.zeros_like(hidden)
        size = self.loss.rows_at_once(batch, hidden)
        for first in range(0, found.slots.shape[0], size):
            rows = found[slice(first, first + size)]
            weight = weights[part.blocks][rows.blocks, rows.steps] * pace[rows.blocks, rows.steps]
            self._slice_backward(batch, rows, hidden, weight, upstream, result)
        return upstream

    def _rows(self, batch: Batch, part: BlockSlice) -> _Rows:
        """Find the rows with loss; the host knows their number, so that it does not wait for the device."""
        steps, width = batch.steps[part.blocks], batch.step_tokens.shape[1]
        number = int(batch.host.steps[part.blocks].sum())
        dead = (steps[:, None] <= torch.arange(width, device=steps.device)).flatten()
        pairs = torch.sort(dead, stable=True).indices[:number]
        blocks, step = pairs // width, pairs % width
        slots = blocks * part.tokens.shape[1] + step + self.model.shape.bonus_anchor
        teacher = batch.teacher_index[part.blocks].flatten()[pairs]
        return _Rows(slots, step, blocks, teacher, batch.step_tokens[part.blocks].flatten()[pairs])

    def _paces(self, batch: Batch, part: BlockSlice, hidden: Tensor, found: _Rows) -> Tensor:
        """Return what each step of each block weighs, [S, steps] float32."""
        size = (part.tokens.shape[0], batch.step_tokens.shape[1])
        config = self.objective.config
        if config.step_weights == "decay":
            steps = torch.arange(size[1], dtype=torch.float64, device=hidden.device)
            return (config.step_decay**steps).float().expand(size)
        realised = hidden.new_full(size, -1.0, dtype=torch.float32)
        for first in range(0, found.slots.shape[0], self.loss.slice_rows):
            rows = found[slice(first, first + self.loss.slice_rows)]
            logits = float32_product(self.weights.head_inputs(hidden[rows.slots], rows.before), self.weights.head)
            values = self.objective.realised_probability(logits, batch, rows.teacher)
            realised[rows.blocks, rows.steps] = values.to(realised.dtype)
        return d_pace_weights(realised)

    def _slice_backward(
        self, batch: Batch, rows: _Rows, hidden: Tensor, weight: Tensor, upstream: Tensor, result: ObjectiveResult
    ) -> None:
        width, buffers = hidden.shape[1], self.weights.groups.gradients
        chosen = hidden[rows.slots]
        inputs = self.weights.head_inputs(chosen, rows.before)
        logits = float32_product(inputs, self.weights.head)
        if self.model.confidence_head is not None:
            result.loss.add_(self._confidence_backward(batch, rows, inputs, logits, weight))
        losses, hits, gradient = self.loss.of_logits(batch, logits, rows.teacher, weight, inputs.dtype)
        del logits
        result.loss.add_((losses * weight).sum())
        # Not by `index_add_`: its order differs from run to run, and so would the last bits of what is logged.
        of_step = rows.steps == torch.arange(len(result.losses), device=hidden.device)[:, None]
        result.losses.add_((of_step * losses.double()).sum(1))
        result.hits.add_((of_step & hits).sum(1))
        if self.model.shape.train_head:
            add_product(buffers["head"], gradient, inputs[:, :width])
        given = gradient @ self.weights.head
        if self.model.markov_head is not None:
            add_product(buffers["markov"], gradient, inputs[:, width:])
            embedded = self.weights.embedding(self.model.markov_head.markov_w1)
            embedded.index_put_((rows.before,), given[:, width:].to(embedded.dtype), accumulate=True)
        del gradient
        norm = self.model.norm.weight
        upstream[rows.slots] = rms_norm_backward(
            given[:, :width].contiguous(), chosen, norm, self.model.shape.rms_norm_eps, self.weights.gradient(norm)
        )

    def _confidence_backward(self, batch: Batch, rows: _Rows, inputs: Tensor, logits: Tensor, weight: Tensor) -> Tensor:
        """Add the gradients of the confidence head, and return its loss: binary cross entropy to alpha."""
        head = self.model.confidence_head
        assert head is not None, "the caller has checked it"
        target = self.objective.acceptance(logits, batch, rows.teacher)
        wide = inputs.to(head.proj.weight.dtype)
        said = wide @ head.proj.weight[0] + head.proj.bias
        losses = torch.nn.functional.binary_cross_entropy_with_logits(said, target.to(said.dtype), reduction="none")
        slope = weight * (torch.sigmoid(said) - target)
        self.weights.gradient(head.proj.get_parameter("weight"))[0] += slope.to(wide.dtype) @ wide
        self.weights.gradient(head.proj.get_parameter("bias")).add_(slope.sum())
        return (losses * weight).sum()
