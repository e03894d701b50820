"""Forward and backward pass of the unroll by hand, for GPUs: the same loss and gradients as `unroll` and autograd.

Only needed work is done. Queries, output projections, MLP and head run on the rows of each step that carry loss;
other rows give step-0 keys and values. The embeddings' half of the attention input, `input_layernorm(emb(x))`, is the
same for row t at step k as for row t + k at step 0, so its projection is made once, not once per step (5 % of all
matrix work), and so is its gradient's. Head and loss run in the backward sweep, a slice of rows at a time, and give
the gradient at once: no logits are kept.

Matrix products are bf16 with float32 accumulation; weight gradients are float32 from the first addition on.
Kept per row and step: the layer's output, queries, attention output, the MLP's input and (unless `recompute_mlp`)
its gate and up: 29,696 values at the seed's shape, 13,568 with recomputation.

Shape suffixes: R key rows, S start rows, T rows of a step, H hidden, N query heads, G key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from draftcache.draft_train.data.batches import Batch
from draftcache.draft_train.drafts.eagle3.fused_state import BaseRows, KeyGradients, PassSettings, StepState
from draftcache.draft_train.drafts.eagle3.fused_weights import FusedWeights
from draftcache.draft_train.drafts.eagle3.kernels.attention import attend, attend_backward
from draftcache.draft_train.drafts.eagle3.kernels.runs import find_runs
from draftcache.draft_train.drafts.eagle3.kernels.sight import Sight
from draftcache.draft_train.drafts.eagle3.model import Eagle3Model
from draftcache.draft_train.drafts.gradient_pass import Ready
from draftcache.draft_train.kernels.norms import rms_norm, rms_norm_backward
from draftcache.draft_train.kernels.rotary import join_heads, rotary_table, split_heads
from draftcache.draft_train.kernels.swiglu import swiglu, swiglu_backward_
from draftcache.draft_train.loss.head_loss import Head, HeadLoss
from draftcache.draft_train.loss.objective import Objective, ObjectiveResult, tail_sums
from draftcache.store.common.products import add_product


class FusedPass:
    """A `GradientPass` for the draft on one GPU; on the CPU it runs the kernels' plain twins, for tests."""

    def __init__(
        self,
        model: Eagle3Model,
        objective: Objective,
        embeddings: Tensor,
        settings: PassSettings | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """`embeddings` [V, H]: the verifier's frozen table; `dtype`: of the matrix products."""
        self.model, self.layer = model, model.midlayer
        self.shape, self.eps = model.shape, model.shape.rms_norm_eps
        self.embeddings = embeddings
        self.settings = settings or PassSettings()
        self.head_loss = HeadLoss(objective, self.settings.rows)
        self.weights = FusedWeights(model, dtype)
        self.matrices, self.gradients = self.weights.matrices, self.weights.gradients
        norm = model.norm.weight
        self.head = Head(self.matrices.head, norm, self.eps, self.gradients.head, self.gradients.vectors[norm])

    @torch.no_grad()
    def __call__(self, batch: Batch, ready: Ready | None = None) -> ObjectiveResult:
        """See `GradientPass`. `ready` hears of gradients in the order: head, MLP, attention and fc."""
        self.weights.refresh()
        self.weights.attach()
        base = self._base(batch)
        steps: list[StepState] = []
        for sight, starts, kept in self._sights(batch, base):
            steps.append(self._forward_step(base, sight, starts, kept, steps[-1] if steps else None))
        return self._backward(batch, base, steps, ready or (lambda _: None))

    def _sights(self, batch: Batch, base: BaseRows) -> Iterator[tuple[Sight, Tensor, Tensor | None]]:
        """Of each step: what its rows see, [T] int64 the key rows they start at, and which rows of the step before they
        are (None: all).

        The device is asked for nothing, and a step's runs are found while it does the step before.
        """
        host = batch.host
        rows = torch.arange(batch.steps.shape[0], device=batch.steps.device)
        for step in range(batch.step_tokens.shape[1]):
            live = host.steps > step
            number = int(live.sum())
            if number == 0:
                return
            kept = None
            if number < rows.shape[0]:  # not by `nonzero`, which waits for the device to say how many there are
                kept = torch.sort(batch.steps[rows] <= step, stable=True).indices[:number]
                rows = rows[kept]
            runs = None
            if self.settings.flash_attention:
                positions = host.key_positions[host.start_index[live]]
                runs = find_runs(positions, host.key_positions, step, batch.window, rows.device)
            starts = batch.start_index[rows]
            yield Sight(rows, base.positions[starts], base.positions, step, batch.window, runs), starts, kept

    def _base(self, batch: Batch) -> BaseRows:
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
        """[R, H]: normed embeddings."""
        return rms_norm(self._embedded(batch), self.layer.input_layernorm.weight, self.eps)

    def _forward_step(
        self, base: BaseRows, sight: Sight, starts: Tensor, kept: Tensor | None, previous: StepState | None
    ) -> StepState:
        number, rows = sight.step, sight.rows
        hidden, chosen = (base.hidden, starts) if previous is None else (previous.result, kept)
        if chosen is not None:
            hidden = hidden[chosen]
        normed = rms_norm(hidden, self.layer.hidden_norm.weight, self.eps)
        # Row t + k is a start row too, k places on: the turn goes on at least that far, or step k had no loss.
        places = starts + number
        states = self.matrices.qkv_states[: self.weights.queries if number == 0 else None]
        projected = normed @ states.t()
        kv = base.diagonal[number - 1] if number else base.kv[:, :, :0]
        shared = base.projected[:, : states.shape[0]]
        q = split_heads(projected, base.table, places, self.shape.num_attention_heads, kv, rows, shared)
        del projected, normed
        attended = attend(q, base.kv, base.diagonal, sight)
        out = None if chosen is None else hidden  # which is a copy then
        after = torch.addmm(hidden, attended.out.flatten(1), self.matrices.output.t(), out=out)
        result, gate_up = self._mlp(after)
        return StepState(number, rows, places, kept, attended, after, gate_up, result)

    def _mlp(self, after: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Residual included; keeps gate and up of every slice unless they are to be made again."""
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

    def _backward(self, batch: Batch, base: BaseRows, steps: list[StepState], ready: Ready) -> ObjectiveResult:
        wide = self.weights.wide
        keys: KeyGradients | None = None
        result = ObjectiveResult.zeros(batch.step_tokens.shape[1], batch.taps.device)
        total = base.projected.zero_()  # no step reads it any more
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
            given = (after @ self.matrices.output).view_as(step.attended.out)
            add_product(self.gradients.output, after, step.attended.out.flatten(1))
            if keys is None:  # not before: the memory is scarcest in the last step's head and MLP
                keys = KeyGradients(*(torch.zeros_like(held, dtype=wide) for held in (base.kv, base.diagonal)))
            q_gradient = attend_backward(given, step.attended, keys.kv, keys.diagonal)
            del given, step.attended
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
        """Gradient [T, H] of the MLP's input from that of its output, residual included."""
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
        """Gradient of the previous step's result, from a later step's `after` [T, H] on; that of its tokens'
        projections is added to `total`.
        """
        gradients, weight, hidden = self.gradients, self.layer.hidden_norm.weight, previous.result
        projected = join_heads(q_gradient, keys.diagonal[step.number - 1], base.table, step.places, step.rows, total)
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
        """Step 0's inputs, the tokens' projections of all steps, and fc."""
        gradients, matrices, queries = self.gradients, self.matrices, self.weights.queries
        rows, every = step.places, torch.arange(base.hidden.shape[0], device=total.device)
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
