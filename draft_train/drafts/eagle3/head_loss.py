"""Head and loss of the fused pass: a slice of rows at a time, gradients at once, no logits kept.

Shape suffixes: T rows of a step, H hidden, V draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draftcache.draft_train.data.batches import Batch
from draftcache.draft_train.drafts.eagle3.fused_weights import Matrices
from draftcache.draft_train.drafts.eagle3.model import RMSNorm
from draftcache.draft_train.kernels.norms import rms_norm, rms_norm_backward
from draftcache.draft_train.loss.kernels.tail_kl import tail_kl
from draftcache.draft_train.loss.objective import Objective, row_weights, teacher_probabilities
from draftcache.store.common.products import add_product, float32_product

_PLAIN_SHARE = 8
"""Losses without a kernel hold about this many copies of a slice's logits."""


@dataclass(frozen=True)
class HeadSlice:
    """Loss rows of one step."""

    places: Tensor
    """[T] int64 rows of the teacher's arrays."""
    weight: Tensor
    """[T] float32: of each row's loss in the batch's."""


class HeadLoss:
    """The objective's loss and its gradient for un-normed outputs of an unroll step."""

    def __init__(self, objective: Objective, norm: RMSNorm, slice_rows: int) -> None:
        self.objective = objective
        self.norm = norm
        self.slice_rows = slice_rows

    def rows_of(self, batch: Batch, number: int, rows: Tensor) -> HeadSlice:
        """Places and weights of step `number`'s start rows [T]."""
        objective = self.objective
        places = batch.teacher_index[rows, number]
        conversation = batch.conversation[rows]
        ones = torch.ones(rows.shape[0], device=rows.device)
        counts = ones.new_zeros(batch.conversations).index_add_(0, conversation, ones)
        weight = row_weights(objective.config.out_of_vocab, batch, places, objective.in_draft) / counts[conversation]
        return HeadSlice(places, weight * (objective.config.step_decay**number * batch.loss_share))

    def backward(
        self,
        batch: Batch,
        chosen: HeadSlice,
        hidden: Tensor,
        residual: Tensor | None,
        head: Tensor,
        gradients: Matrices,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient [T, H] of `hidden` plus `residual`, losses [T] float32 and hits [T] bool.

        `head` [V, H]; gradients of head and norm are added to `gradients`.
        """
        losses, hits, upstream = [], [], torch.empty_like(hidden)
        size = self.slice_rows if self._fused(batch) else max(1, self.slice_rows // _PLAIN_SHARE)
        for first in range(0, hidden.shape[0], size):
            rows = slice(first, first + size)
            normed = rms_norm(hidden[rows], self.norm.weight, self.norm.eps)
            loss, hit, gradient = self._slice(batch, normed, head, chosen.places[rows], chosen.weight[rows])
            losses.append(loss)
            hits.append(hit)
            add_product(gradients.head, gradient, normed)
            torch.mm(gradient, head, out=upstream[rows])
            del gradient
        out = rms_norm_backward(
            upstream, hidden, self.norm.weight, self.norm.eps, gradients.vectors[self.norm.weight], residual
        )
        return out, torch.cat(losses), torch.cat(hits)

    def _fused(self, batch: Batch) -> bool:
        return batch.teacher_hidden is None and self.objective.config.loss == "tail-kl"

    def _slice(
        self, batch: Batch, normed: Tensor, head: Tensor, places: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses [T], hits [T], and the weighted gradient of the logits [T, V] in the products' dtype."""
        logits = float32_product(normed, head)
        if self._fused(batch):
            p, tau = teacher_probabilities(batch.teacher_logits[places], batch.log_z_draft[places])
            gradient = torch.empty_like(logits, dtype=normed.dtype)
            losses, argmax = tail_kl(logits, batch.teacher_ids[places], p, tau, weight, gradient)
            return losses, self.objective.target_ids[argmax] == batch.argmax[places], gradient
        with torch.enable_grad():
            leaf = logits.requires_grad_()
            losses, hits = self.objective.row_losses(leaf, batch, places)
            (gradient,) = torch.autograd.grad(losses, leaf, weight.to(losses.dtype))
        return losses.detach(), hits, gradient.to(normed.dtype)
