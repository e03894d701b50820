"""The forward half of the fused pass over blocks, which an evaluation runs alone.

A batch's blocks go through in slices: every slice needs the keys and values of the context, which are made once for all
layers, and nothing of another slice. So the memory does not grow with the number of anchors.

Shape suffixes: R context rows, S blocks, B slots, T = S B slot rows of a slice, H hidden, N query heads, G key-value
heads, D head width, V draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from draftcache.draft_train.data.batches import Batch
from draftcache.draft_train.drafts.block.forward import layer_mask, slot_tokens
from draftcache.draft_train.drafts.block.fused_weights import BlockWeights, LayerWeights
from draftcache.draft_train.drafts.block.kernels.attention import attend_blocks
from draftcache.draft_train.drafts.block.kernels.attention_result import BlockAttentionResult
from draftcache.draft_train.drafts.block.kernels.block_mask import BlockMask
from draftcache.draft_train.drafts.block.model import BlockModel
from draftcache.draft_train.drafts.protocol import StepLogits
from draftcache.draft_train.kernels.normed_heads import split_normed_heads
from draftcache.draft_train.kernels.norms import rms_norm
from draftcache.draft_train.kernels.rotary import rotary_table
from draftcache.draft_train.kernels.swiglu import swiglu
from draftcache.store.common.products import float32_product


@dataclass(frozen=True)
class BlockSettings:
    """Settings that trade memory for time."""

    slot_rows: int = 16_384
    """Slot rows of a slice of blocks."""
    rows: int = 8192
    """Rows whose logits exist at once."""
    recompute_mlp: bool = False
    """Whether gate and up are recomputed in the backward pass instead of kept."""


@dataclass(frozen=True)
class Context:
    """The context rows of a batch: what every slice reads."""

    base: Tensor
    """[R, H]: fc's output, un-normed."""
    states: Tensor
    """[R, H]: `base`, normed."""
    table: Tensor
    """[2, R, D/2]: the rotary table of the rows' positions."""
    projected: list[Tensor]
    """By layer, [R, 2 G D]: keys before their norm, and values."""
    kv: list[Tensor]
    """By layer, [R, 2, G, D]."""


@dataclass(frozen=True)
class BlockSlice:
    """Some blocks of a batch, one after the other."""

    blocks: slice
    """Their numbers among the batch's start rows."""
    rows: slice
    """The context rows that they reach."""
    tokens: Tensor
    """[S, B] int64: what the slots read."""
    table: Tensor
    """[2, T, D/2]: the rotary table of the slots' positions."""
    every: Tensor
    """[T] int64: 0 .. T-1."""


@dataclass
class LayerState:
    """What one layer over one slice keeps for the backward pass."""

    hidden: Tensor
    """[T, H]: its input."""
    projected: Tensor
    """[T, (N + 2G) D]: queries and keys before their norms, and values."""
    attention: BlockAttentionResult
    after: Tensor
    """[T, H]: the state after attention, un-normed, which the MLP reads."""
    gate_up: Tensor | None
    """[T, 2I]; None if it is recomputed."""


class BlockForward:
    """Computes blocks, and from them the draft's choices. On the CPU the kernels' plain twins run."""

    def __init__(
        self,
        model: BlockModel,
        embeddings: Tensor,
        settings: BlockSettings | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """`embeddings` [vocabulary, H] is the verifier's frozen table, `dtype` the dtype of the matrix products."""
        self.model, self.shape, self.eps = model, model.shape, model.shape.rms_norm_eps
        self.embeddings = embeddings
        self.settings = settings or BlockSettings()
        self.weights = BlockWeights(model, dtype)

    @torch.no_grad()
    def step_logits(self, batch: Batch, count: int) -> Iterator[StepLogits]:
        """Yield the logits of steps 0 .. count-1, slice by slice, in slices of at most `settings.rows` rows.

        `batch` was made for `count` steps. The host does not wait for the device here.
        """
        self.weights.refresh()
        layers = self.weights.layers(gradients=False)
        context, masks = self._context(batch, layers), self._masks(batch)
        size, bonus = self.settings.rows, self.shape.bonus_anchor
        for part in self._slices(batch, self.shape.slots(count)):
            hidden = self._embedded(part)
            for number, layer in enumerate(layers):
                hidden, _ = self._forward_layer(layer, context.kv[number], masks[number], part, hidden)
            hidden = hidden.view(*part.tokens.shape, -1)
            steps = batch.host.steps[part.blocks]
            for number in range(count):
                live = int((steps > number).sum())
                rows = torch.sort(batch.steps[part.blocks] <= number, stable=True).indices[:live]
                for first in range(0, live, size):
                    chosen = rows[first : first + size]
                    before = batch.step_tokens[part.blocks][chosen, number]
                    inputs = self.weights.head_inputs(hidden[chosen, number + bonus], before)
                    logits = float32_product(inputs, self.weights.head)
                    yield StepLogits(number, chosen + part.blocks.start, logits)

    def _context(self, batch: Batch, layers: list[LayerWeights]) -> Context:
        """Compute fc, and the keys and values of the context rows in every layer."""
        base = batch.taps.to(self.weights.dtype) @ self.weights.fc.t()
        states = rms_norm(base, self.model.hidden_norm.weight, self.eps)
        table = rotary_table(batch.key_positions, self.shape.head_dim, self.shape.rope_theta, self.weights.dtype)
        every = torch.arange(base.shape[0], device=base.device)
        projected = [states @ layer.qkv[layer.queries :].t() for layer in layers]
        kv = [
            split_normed_heads(values, replace(layer.norms, queries=0), table, every)[1]
            for values, layer in zip(projected, layers, strict=True)
        ]
        return Context(base, states, table, projected, kv)

    def _masks(self, batch: Batch) -> list[BlockMask]:
        """Return the mask of every layer; layers that see the same share one."""
        kinds = list(zip(self.shape.layer_types, self.shape.causal, strict=True))
        made = {kind: layer_mask(self.shape, kinds.index(kind), batch) for kind in set(kinds)}
        return [made[kind] for kind in kinds]

    def _slices(self, batch: Batch, slots: int) -> Iterator[BlockSlice]:
        """Cut the blocks into slices. Which rows each reaches is found on the host, from its copies."""
        positions, starts = batch.host.key_positions, batch.host.start_index
        window, step = self.shape.sliding_window or batch.window, max(1, self.settings.slot_rows // slots)
        tokens = slot_tokens(self.shape, batch, slots)
        for first in range(0, len(starts), step):
            blocks = slice(first, min(first + step, len(starts)))
            begin = int(np.searchsorted(positions, positions[starts[first]] + 2 - window))
            rows = slice(begin, int(starts[blocks.stop - 1]) + 1)
            own = batch.key_positions[batch.start_index[blocks], None] + 1
            own = (own + torch.arange(slots, device=own.device)).flatten()
            table = rotary_table(own, self.shape.head_dim, self.shape.rope_theta, self.weights.dtype)
            yield BlockSlice(blocks, rows, tokens[blocks], table, torch.arange(own.shape[0], device=own.device))

    def _embedded(self, part: BlockSlice) -> Tensor:
        """Return the embeddings [T, H] of what the slots read."""
        return self.model.embed(part.tokens.flatten(), self.embeddings).to(self.weights.dtype)

    def _forward_layer(
        self, layer: LayerWeights, context_kv: Tensor, mask: BlockMask, part: BlockSlice, hidden: Tensor
    ) -> tuple[Tensor, LayerState]:
        """Return a layer's output [T, H] for its input `hidden` [T, H], and what its backward pass needs."""
        (blocks, slots), module = part.tokens.shape, layer.layer
        normed = rms_norm(hidden, module.input_layernorm.weight, self.eps)
        projected = normed @ layer.qkv.t()
        q, kv = split_normed_heads(projected, layer.norms, part.table, part.every)
        sinks = module.self_attn.attention_sink_bias
        attention = attend_blocks(
            q.view(blocks, slots, *q.shape[1:]),
            context_kv[part.rows],
            kv.view(blocks, slots, *kv.shape[1:]),
            mask.part(part.blocks, part.rows),
            None if sinks is None else sinks.detach(),
        )
        after = torch.addmm(hidden, attention.out.view(len(hidden), -1), layer.output.t())
        gate_up = self._mlp_input(layer, after) @ layer.gate_up.t()
        result = torch.addmm(after, swiglu(gate_up), layer.down.t())
        kept = None if self.settings.recompute_mlp else gate_up
        return result, LayerState(hidden, projected, attention, after, kept)

    def _mlp_input(self, layer: LayerWeights, after: Tensor) -> Tensor:
        return rms_norm(after, layer.layer.post_attention_layernorm.weight, self.eps)
