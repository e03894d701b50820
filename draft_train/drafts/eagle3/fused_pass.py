"""Hand-written forward and backward pass of the unroll, for GPUs: the loss and gradients of `unroll` with autograd.

It does no work that is not needed. Queries, output projections, MLP and head run on the rows of each step that carry
loss; other rows only provide step-0 keys and values. The embeddings' half of the attention input,
`input_layernorm(emb(x))`, is the same for row t at step k as for row t + k at step 0. So its projection is computed
once, not once per step (5 % of all matrix work), and so is the gradient of that projection. Head and loss run in the
backward pass, a slice of rows at a time, and compute the gradient at once, so that no logits are kept.

Matrix products are bf16 with float32 accumulation, and weight gradients are float32 from the first addition on. Kept
per row and step are the layer's output, queries, attention output, the MLP's input and (unless `recompute_mlp`) its
gate and up: 29,696 values at the seed's shape, 13,568 with recomputation.

Shape suffixes: R key rows, S start rows, T rows of a step, H hidden, N query heads, G key-value heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftcache.draft_train.data.batches import Batch
from draftcache.draft_train.drafts.eagle3.fused_forward import FusedForward
from draftcache.draft_train.drafts.eagle3.fused_state import BaseRows, FusedPassSettings, KeyGradients, StepState
from draftcache.draft_train.drafts.eagle3.kernels.attention import attend_backward
from draftcache.draft_train.drafts.eagle3.model import Eagle3Model
from draftcache.draft_train.drafts.gradient_pass import GradientHook
from draftcache.draft_train.kernels.norms import rms_norm, rms_norm_backward
from draftcache.draft_train.kernels.rotary import join_heads
from draftcache.draft_train.kernels.swiglu import swiglu_backward_
from draftcache.draft_train.loss.head_loss import Head, HeadLoss
from draftcache.draft_train.loss.objective import Objective, ObjectiveResult, tail_sums
from draftcache.store.common.products import add_product


class FusedPass(FusedForward):
    """The gradient pass on one GPU. Implements `GradientPass`. On the CPU the kernels' plain twins run, for tests."""

    def __init__(
        self,
        model: Eagle3Model,
        objective: Objective,
        embeddings: Tensor,
        settings: FusedPassSettings | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """The arguments are those of `FusedForward`."""
        super().__init__(model, embeddings, settings, dtype)
        self.head_loss = HeadLoss(objective, self.settings.rows)
        self.gradients = self.weights.gradients
        norm = model.norm.weight
        self.head = Head(self.matrices.head, norm, self.eps, self.gradients.head, self.gradients.vectors[norm])

    @torch.no_grad()
    def __call__(self, batch: Batch, ready: GradientHook | None = None) -> ObjectiveResult:
        """Gradients are complete, and `ready` is called, in this order: head and norm, MLP, attention and fc."""
        self.weights.refresh()
        self.weights.attach()
        base = self._base(batch)
        steps: list[StepState] = []
        for mask, starts, kept in self._step_masks(batch, base):
            steps.append(self._forward_step(base, mask, starts, kept, steps[-1] if steps else None))
        return self._backward(batch, base, steps, ready or (lambda _: None))

    def _backward(self, batch: Batch, base: BaseRows, steps: list[StepState], ready: GradientHook) -> ObjectiveResult:
        wide = self.weights.wide
        keys: KeyGradients | None = None
        result = ObjectiveResult.zeros(batch.step_tokens.shape[1], batch.taps.device)
        total = base.projected.zero_()  # no step reads the projections any more
        carried: Tensor | None = None
        while steps:
            step = steps.pop()
            chosen = self.head_loss.rows_of(batch, step.number, step.rows)
            upstream, losses, hits = self.head_loss.backward(batch, chosen, step.result, carried, self.head)
            result.loss.add_((losses * chosen.weight).sum())
            result.rows[step.number].fill_(losses.numel())  # assigning a number would wait for the device
            result.losses[step.number] = losses.sum()
            result.hits[step.number] = hits.sum()
            del step.result
            if step.number == 0:
                ready(self.weights.head_parameters)
            after = self._mlp_backward(step, upstream)
            if step.number == 0:
                ready(self.weights.mlp_parameters)
            del upstream
            given = (after @ self.matrices.output).view_as(step.attention.out)
            add_product(self.gradients.output, after, step.attention.out.flatten(1))
            if keys is None:  # not before, as memory is scarcest in the last step's head and MLP
                keys = KeyGradients(*(torch.zeros_like(held, dtype=wide) for held in (base.kv, base.diagonal)))
            q_gradient = attend_backward(given, step.attention, keys.kv, keys.diagonal)
            del given, step.attention
            if step.number:
                carried = self._inputs_backward(base, step, steps[-1], q_gradient, keys, total, after)
                del q_gradient, after
            else:
                self._base_backward(batch, base, step, q_gradient, keys, total, after)
        ready(self.weights.attention_parameters)
        for total_of, added in zip((result.tail_mass, result.tail_positions), tail_sums(batch), strict=True):
            total_of.copy_(added)
        return result

    def _mlp_backward(self, step: StepState, upstream: Tensor) -> Tensor:
        """Return the gradient [T, H] of the MLP's input for `upstream` [T, H], the gradient of its output."""
        gradients, weight = self.gradients, self.layer.post_attention_layernorm.weight
        out = torch.empty_like(upstream)
        for number, rows in enumerate(self._slices(upstream)):
            normed = self._mlp_input(step.after[rows])
            gate_up = step.gate_up[number] if step.gate_up else normed @ self.matrices.gate_up.t()
            activation = swiglu_backward_(upstream[rows] @ self.matrices.down, gate_up)
            add_product(gradients.down, upstream[rows], activation)
            del activation
            add_product(gradients.gate_up, gate_up, normed)
            given = gate_up @ self.matrices.gate_up
            out[rows] = rms_norm_backward(
                given, step.after[rows], weight, self.eps, gradients.vectors[weight], upstream[rows]
            )
        step.gate_up.clear()
        return out

    def _inputs_backward(
        self,
        base: BaseRows,
        step: StepState,
        previous: StepState,
        q_gradient: Tensor,
        keys: KeyGradients,
        total: Tensor,
        after: Tensor,
    ) -> Tensor:
        """Return the gradient of the previous step's result; `after` [T, H] is the gradient of this step's `after`.

        The gradient of the tokens' projections is added to `total` [R, (N + 2G) D].
        """
        gradients, weight = self.gradients, self.layer.hidden_norm.weight
        hidden, kept = previous.result, step.kept
        if self.shape.norm_output:
            hidden, kept = self._carried(previous, kept), None
        projected = join_heads(q_gradient, keys.diagonal[step.number - 1], base.table, step.key_rows, step.rows, total)
        add_product(gradients.qkv_states, projected, rms_norm(hidden, weight, self.eps, kept))
        given = projected @ self.matrices.qkv_states
        del projected
        given = rms_norm_backward(given, hidden, weight, self.eps, gradients.vectors[weight], after, kept)
        if not self.shape.norm_output:
            return given
        norm = self.model.norm.weight
        return rms_norm_backward(given, previous.result, norm, self.eps, gradients.vectors[norm], kept=step.kept)

    def _base_backward(
        self,
        batch: Batch,
        base: BaseRows,
        step: StepState,
        q_gradient: Tensor,
        keys: KeyGradients,
        total: Tensor,
        after: Tensor,
    ) -> None:
        """Add the gradients of the weights that step 0 reads, of the tokens' projections of all steps, and of fc."""
        gradients, matrices, queries = self.gradients, self.matrices, self.weights.queries
        rows, every = step.key_rows, torch.arange(base.hidden.shape[0], device=total.device)
        asked = join_heads(q_gradient, keys.kv[:, :, :0], base.table, rows, rows, total[:, :queries])
        no_queries = q_gradient.new_empty(base.hidden.shape[0], 0, q_gradient.shape[-1])
        shared = join_heads(no_queries, keys.kv, base.table, every, every, total[:, queries:])
        weight = self.layer.hidden_norm.weight
        normed = rms_norm(base.hidden, weight, self.eps)
        add_product(gradients.qkv_states[queries:], shared, normed)
        add_product(gradients.qkv_states[:queries], asked, normed[rows])
        given = shared @ matrices.qkv_states[queries:]
        given[rows] += asked @ matrices.qkv_states[:queries]
        residual = torch.zeros_like(base.hidden).index_copy_(0, rows, after)
        hidden = rms_norm_backward(given, base.hidden, weight, self.eps, gradients.vectors[weight], residual)
        self._fc_backward(batch, hidden)
        add_product(gradients.qkv_tokens, total, self._tokens(batch))
        weight = self.layer.input_layernorm.weight
        given = total @ matrices.qkv_tokens
        rms_norm_backward(given, self._embedded(batch), weight, self.eps, gradients.vectors[weight])

    def _fc_backward(self, batch: Batch, upstream: Tensor) -> None:
        """Add the gradients of fc, and of the taps' norms, for `upstream` [R, H], the gradient of fc's output."""
        add_product(self.gradients.fc, upstream, self._fc_input(batch))
        for columns, norm in self._tap_norms():
            given, tap = upstream @ self.matrices.fc[:, columns], batch.taps[:, columns].to(upstream.dtype)
            rms_norm_backward(given, tap.contiguous(), norm, self.eps, self.gradients.vectors[norm])
