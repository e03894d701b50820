"""The forward half of the fused pass, which an evaluation runs alone.

Shape suffixes: R key rows, S start rows, T rows of a step, H hidden, N query heads, G key-value heads, D head width,
V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from draftcache.draft_train.data.batches import Batch
from draftcache.draft_train.drafts.eagle3.fused_state import BaseRows, FusedPassSettings, StepState
from draftcache.draft_train.drafts.eagle3.fused_weights import FusedWeights
from draftcache.draft_train.drafts.eagle3.kernels.attention import attend
from draftcache.draft_train.drafts.eagle3.kernels.runs import find_runs
from draftcache.draft_train.drafts.eagle3.kernels.step_mask import StepMask
from draftcache.draft_train.drafts.eagle3.model import Eagle3Model
from draftcache.draft_train.drafts.protocol import StepLogits, greedy_choices
from draftcache.draft_train.kernels.norms import rms_norm
from draftcache.draft_train.kernels.rotary import rotary_table, split_heads
from draftcache.draft_train.kernels.swiglu import swiglu
from draftcache.store.common.products import float32_product


class FusedForward:
    """Computes the unroll's steps, and from them the draft's choices. On the CPU the kernels' plain twins run."""

    def __init__(
        self,
        model: Eagle3Model,
        embeddings: Tensor,
        settings: FusedPassSettings | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """`embeddings` [V, H] is the verifier's frozen table, `dtype` the dtype of the matrix products."""
        self.model, self.layer = model, model.midlayer
        self.shape, self.eps = model.shape, model.shape.rms_norm_eps
        self.embeddings = embeddings
        self.settings = settings or FusedPassSettings()
        self.weights = FusedWeights(model, dtype)
        self.matrices = self.weights.matrices

    def propose(self, batch: Batch, count: int) -> Tensor:
        """Return the greedy choices [S, count] int64 by start row and step, as draft ids; -1 past the row's steps.

        `batch` was made for `count` steps.
        """
        return greedy_choices(self.step_logits(batch, count), batch, count)

    @torch.no_grad()
    def step_logits(self, batch: Batch, count: int) -> Iterator[StepLogits]:
        """Yield the logits of the steps, in slices of at most `settings.rows` rows. `batch` was made for `count` steps.

        The host does not wait for the device here.
        """
        self.weights.refresh()
        base = self._base(batch)
        state: StepState | None = None
        for mask, starts, kept in self._step_masks(batch, base):
            state = self._forward_step(base, mask, starts, kept, state)
            for first in range(0, state.rows.shape[0], self.settings.rows):
                rows = slice(first, first + self.settings.rows)
                normed = rms_norm(state.result[rows], self.model.norm.weight, self.eps)
                yield StepLogits(state.number, state.rows[rows], float32_product(normed, self.matrices.head))

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
        hidden = self._fc_input(batch) @ matrices.fc.t()
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

    def _fc_input(self, batch: Batch) -> Tensor:
        """Return the taps [R, taps * H], each through its own norm where the shape says `fc_norm`."""
        taps = batch.taps.to(self.weights.dtype)
        if not self.shape.fc_norm:
            return taps
        normed = torch.empty_like(taps)
        for columns, norm in self._tap_norms():
            normed[:, columns] = rms_norm(taps[:, columns].contiguous(), norm, self.eps)
        return normed

    def _tap_norms(self) -> list[tuple[slice, nn.Parameter]]:
        """Return for each tap its columns of fc's input, and the weight of its norm."""
        width = self.shape.hidden_size
        norms = [norm.get_parameter("weight") for norm in self.model.fc_norm]
        return [(slice(number * width, (number + 1) * width), norm) for number, norm in enumerate(norms)]

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
        is_copy = chosen is not None
        if previous is not None and self.shape.norm_output:
            hidden, is_copy = self._carried(previous, kept), True
        elif chosen is not None:
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
        out = hidden if is_copy else None
        after = torch.addmm(hidden, attention.out.flatten(1), self.matrices.output.t(), out=out)
        result, gate_up = self._mlp(after)
        return StepState(number, rows, key_rows, kept, attention, after, gate_up, result)

    def _carried(self, previous: StepState, kept: Tensor | None) -> Tensor:
        """Return the state [T, H] after the final norm that a step consumes, for rows `kept` of the previous one."""
        return rms_norm(previous.result, self.model.norm.weight, self.eps, kept)

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
