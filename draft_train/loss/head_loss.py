"""Norm, head and loss for a hand-written backward pass: slice by slice, with gradients at once and no logits kept.

Shape suffixes: T rows of a step, H hidden, V draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draftcache.draft_train.data.batches import Batch
from draftcache.draft_train.kernels.norms import rms_norm, rms_norm_backward
from draftcache.draft_train.loss.objective import Objective, row_weights
from draftcache.store.common.products import add_product, float32_product

_PLAIN_SHARE = 8
"""Losses without a kernel hold about this many copies of a slice's logits, so their slices are that much smaller."""


@dataclass(frozen=True)
class LossRows:
    """The loss rows of one step."""

    teacher_rows: Tensor
    """[T] int64 rows of the batch's teacher arrays."""
    weight: Tensor
    """[T] float32 weight of each row's loss in the loss of the batch."""


@dataclass(frozen=True)
class Head:
    """The weights of norm and head, and the buffers that their gradients are added to."""

    matrix: Tensor
    """[V, H] weight of the head, in the dtype of the matrix products."""
    norm: Tensor
    """[H] float32 weight of the RMS norm before the head."""
    eps: float
    matrix_gradient: Tensor
    """[V, H] float32."""
    norm_gradient: Tensor
    """[H] float32."""


class HeadLoss:
    """Computes the objective's loss, and its gradient, from the un-normed outputs of a step."""

    def __init__(self, objective: Objective, slice_rows: int) -> None:
        """`slice_rows` is the number of rows whose logits exist at once."""
        self.objective = objective
        self.slice_rows = slice_rows

    def rows_of(self, batch: Batch, number: int, rows: Tensor) -> LossRows:
        """Return teacher rows and weights of the start rows `rows` [T] int64 at step `number`."""
        objective = self.objective
        teacher_rows = batch.teacher_index[rows, number]
        conversation = batch.conversation[rows]
        ones = torch.ones(rows.shape[0], device=rows.device)
        counts = ones.new_zeros(batch.conversations).index_add_(0, conversation, ones)
        weight = row_weights(objective.config.out_of_vocab, batch, teacher_rows, objective.in_draft)
        weight = weight / counts[conversation]
        return LossRows(teacher_rows, weight * (objective.config.step_decay**number * batch.loss_share))

    def backward(
        self, batch: Batch, chosen: LossRows, hidden: Tensor, residual: Tensor | None, head: Head
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradient [T, H] of `hidden` [T, H] plus `residual`, losses [T] float32 and hits [T] bool.

        The gradients of norm and head are added to the buffers of `head`.
        """
        losses, hits, upstream = [], [], torch.empty_like(hidden)
        size = self.rows_at_once(batch, hidden)
        for first in range(0, hidden.shape[0], size):
            rows = slice(first, first + size)
            normed = rms_norm(hidden[rows], head.norm, head.eps)
            logits = float32_product(normed, head.matrix)
            loss, hit, gradient = self.of_logits(
                batch, logits, chosen.teacher_rows[rows], chosen.weight[rows], normed.dtype
            )
            del logits
            losses.append(loss)
            hits.append(hit)
            add_product(head.matrix_gradient, gradient, normed)
            torch.mm(gradient, head.matrix, out=upstream[rows])
            del gradient
        out = rms_norm_backward(upstream, hidden, head.norm, head.eps, head.norm_gradient, residual)
        return out, torch.cat(losses), torch.cat(hits)

    def rows_at_once(self, batch: Batch, hidden: Tensor) -> int:
        """Return the rows of a slice of states [T, H]."""
        kernel = self.objective.loss.has_kernel(hidden, batch.teacher_hidden is not None)
        return self.slice_rows if kernel else max(1, self.slice_rows // _PLAIN_SHARE)

    def of_logits(
        self, batch: Batch, logits: Tensor, teacher_rows: Tensor, weight: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return losses [T], hits [T] bool, and the weighted gradient of the logits [T, V] in `dtype`.

        The logits may be overwritten.
        """
        gradient = torch.empty_like(logits, dtype=dtype)
        teacher = self.objective.row_teacher(batch, teacher_rows)
        losses, argmax = self.objective.loss.weighted_gradient(logits, teacher, weight, gradient)
        return losses, self.objective.target_ids[argmax] == batch.argmax[teacher_rows], gradient
