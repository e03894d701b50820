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

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from draftcache.draft_train.data.batches import Batch
from draftcache.draft_train.drafts.eagle3.fused_state import BaseRows, FusedPassSettings, KeyGradients, StepState
from draftcache.draft_train.drafts.eagle3.fused_weights import FusedWeights
from draftcache.draft_train.drafts.eagle3.kernels.attention import attend, attend_backward
from draftcache.draft_train.drafts.eagle3.kernels.runs import find_runs
from draftcache.draft_train.drafts.eagle3.kernels.step_mask import StepMask
from draftcache.draft_train.drafts.eagle3.model import Eagle3Model
from draftcache.draft_train.drafts.gradient_pass import GradientHook
from draftcache.draft_train.kernels.norms import rms_norm, rms_norm_backward
from draftcache.draft_train.kernels.rotary import join_heads, rotary_table, split_heads
from draftcache.draft_train.kernels.swiglu import swiglu, swiglu_backward_
from draftcache.draft_train.loss.head_loss import Head, HeadLoss
from draftcache.draft_train.loss.objective import Objective, ObjectiveResult, tail_sums
from draftcache.store.common.products import add_product


class FusedPass:
    """The gradient pass on one GPU. Implements `GradientPass`. On the CPU the kernels' plain twins run, for tests."""

    def __init__(
        self,
        model: Eagle3Model,
        objective: Objective,
        embeddings: Tensor,
        settings: FusedPassSettings | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """`embeddings` [V, H] is the verifier's frozen table, `dtype` the dtype of the matrix products."""
        self.model, self.layer = model, model.midlayer
        self.shape, self.eps = model.shape, model.shape.rms_norm_eps
        self.embeddings = embeddings
        self.settings = settings or FusedPassSettings()
        self.head_loss = HeadLoss(objective, self.settings.rows)
        self.weights = FusedWeights(model, dtype)
        self.matrices, self.gradients = self.weights.matrices, self.weights.gradients
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

    def _step_masks(self, batch: Batch, base: BaseRows) -> Iterator[tuple[StepMask, Tensor, Tensor | None]]:
        """Yield for each step: its attention mask, the key row [T] int64 of each start row, and `StepState.kept`.

        The host does not wait for the device here, and finds a step's runs while the device computes the step before.
        """
        host = batch.host
        rows = torch.arange(batch.steps.shape[0], device=batch.steps.device)
        for step in range(batch.step_tokens.shape[1]):
            live = host.steps > step
            number = int(live.sum())
            if number == 0:
                return
            kept = None
            if number < rows.shape[0]:  # `nonzero` would wait for the device to count them
                kept = torch.sort(batch.steps[rows] <= step, stable=True).indices[:number]
                rows = rows[kept]
            runs = None
            if self.settings.flash_attention:
                positions = host.key_positions[host.start_index[live]]
                runs = find_runs(positions, host.key_positions, step, batch.window, rows.device)
            starts = batch.start_index[rows]
            yield StepMask(rows, base.positions[starts], base.positions, step, batch.window, runs), starts, kept

    def _base(self, batch: Batch) -> BaseRows:
        """Compute fc, the projections of all tokens, and step-0 keys and values."""
        shape, matrices, dtype = self.shape, self.matrices, self.weights.dtype
        projected = self._tokens(batch) @ matrices.qkv_tokens.t()
        hidden = batch.taps.to(dtype) @ matrices.fc.t()
        heads = (2, shape.num_key_value_heads, shape.head_dim)
        base = BaseRows(
            projected=projected,
            hidden=hidden,
            table=rotary_table(batch.key_positions, shape.head_dim, shape.rope_theta, dtype),
            kv=hidden.new_empty(hidden.shape[0], *heads),
            diagonal=hidden.new_empty(max(0, batch.step_tokens.shape[1] - 1), batch.start_index.shape[0], *heads),
            positions=batch.key_positions.to(torch.int32),
        )
        queries, every = self.weights.queries, torch.arange(hidden.shape[0], device=hidden.device)
        normed = rms_norm(hidden, self.layer.hidden_norm.weight, self.eps)
        keys = torch.addmm(projected[:, queries:], normed, matrices.qkv_states[queries:].t())
        split_heads(keys, base.table, every, 0, base.kv, every)
        return base

    def _embedded(self, batch: Batch) -> Tensor:
        return F.embedding(batch.key_tokens, self.embeddings).to(self.weights.dtype)

    def _tokens(self, batch: Batch) -> Tensor:
        """Return the normed embeddings [R, H]."""
        return rms_norm(self._embedded(batch), self.layer.input_layernorm.weight, self.eps)

    def _forward_step(
        self, base: BaseRows, mask: StepMask, starts: Tensor, kept: Tensor | None, previous: StepState | None
    ) -> StepState:
        number, rows = mask.step, mask.rows
        hidden, chosen = (base.hidden, starts) if previous is None else (previous.result, kept)
        if chosen is not None:
            hidden = hidden[chosen]
        normed = rms_norm(hidden, self.layer.hidden_norm.weight, self.eps)
        # Row t + k is a start row too, k rows after row t: the turn goes on that far, or step k would carry no loss.
        key_rows = starts + number
        states = self.matrices.qkv_states[: self.weights.queries if number == 0 else None]
        projected = normed @ states.t()
        kv = base.diagonal[number - 1] if number else base.kv[:, :, :0]
        shared = base.projected[:, : states.shape[0]]
        q = split_heads(projected, base.table, key_rows, self.shape.num_attention_heads, kv, rows, shared)
        del projected, normed
        attention = attend(q, base.kv, base.diagonal, mask)
        out = None if chosen is None else hidden  # it is a copy then
        after = torch.addmm(hidden, attention.out.flatten(1), self.matrices.output.t(), out=out)
        result, gate_up = self._mlp(after)
        return StepState(number, rows, key_rows, kept, attention, after, gate_up, result)

    def _mlp(self, after: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the MLP's output [T, H], residual included, and gate and up by slice unless they are recomputed."""
        result, held = torch.empty_like(after), []
        for rows in self._slices(after):
            gate_up = self._mlp_input(after[rows]) @ self.matrices.gate_up.t()
            torch.addmm(after[rows], swiglu(gate_up), self.matrices.down.t(), out=result[rows])
            if not self.settings.recompute_mlp:
                held.append(gate_up)
        return result, held

    def _mlp_input(self, after: Tensor) -> Tensor:
        return rms_norm(after, self.layer.post_attention_layernorm.weight, self.eps)

    def _slices(self, rows: Tensor) -> list[slice]:
        size = self.settings.mlp_rows
        return [slice(first, min(first + size, len(rows))) for first in range(0, len(rows), size)]

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
        gradients, weight, hidden = self.gradients, self.layer.hidden_norm.weight, previous.result
        projected = join_heads(q_gradient, keys.diagonal[step.number - 1], base.table, step.key_rows, step.rows, total)
        add_product(gradients.qkv_states, projected, rms_norm(hidden, weight, self.eps, step.kept))
        given = projected @ self.matrices.qkv_states
        del projected
        return rms_norm_backward(given, hidden, weight, self.eps, gradients.vectors[weight], after, step.kept)

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
        add_product(gradients.fc, hidden, batch.taps.to(hidden.dtype))
        add_product(gradients.qkv_tokens, total, self._tokens(batch))
        weight = self.layer.input_layernorm.weight
        given = total @ matrices.qkv_tokens
        rms_norm_backward(given, self._embedded(batch), weight, self.eps, gradients.vectors[weight])
