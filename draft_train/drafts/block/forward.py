"""The plain forward pass of a block draft: every start row's block over the context before it.

The anchor of start row t is token x_{t+1}, at position a = t + 1: the last token that the verifier has produced. Slot j
of its block is at position a + j, and reads the embedding of the anchor (j = 0) or of the mask token (j > 0). It sees
the context rows up to t that are in its layer's window, and slots of its own block. Where the anchor predicts
(DSpark), slot j proposes x_{t+2+j}; otherwise (DFlash) slot j + 1 does. So step k of a start row has the same token
and the same teacher, P_{t+1+k}, as in an unrolled draft.

Shape suffixes: R context rows, S start rows, B slots, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from draftcache.draft_train.data.batches import Batch
from draftcache.draft_train.drafts.block.block_attention import block_attention
from draftcache.draft_train.drafts.block.kernels.block_mask import BlockMask
from draftcache.draft_train.drafts.block.model import BlockModel
from draftcache.draft_train.drafts.block.shape import BlockShape
from draftcache.draft_train.drafts.layers import compute_dtype
from draftcache.draft_train.loss.objective import StepOutput


def block_outputs(model: BlockModel, embeddings: Tensor, batch: Batch, steps: int) -> Iterator[StepOutput]:
    """Yield the outputs of steps 0 .. steps-1, as long as any start row is left.

    `embeddings` [vocabulary, H] are the verifier's. Blocks have as many slots as propose `steps` tokens, as when an
    engine asks for that many.
    """
    if batch.start_index.numel() == 0:
        return
    hidden = block_states(model, embeddings, batch, model.shape.slots(steps))
    for number in range(steps):
        rows = torch.nonzero(batch.steps > number)[:, 0]
        if rows.numel() == 0:
            return
        yield StepOutput(number, rows, hidden[rows, number + model.shape.bonus_anchor])


def block_states(model: BlockModel, embeddings: Tensor, batch: Batch, slots: int) -> Tensor:
    """Return the last layer's un-normed outputs [S, slots, H] of every start row's block."""
    dtype = compute_dtype(model.fc.weight)
    context = model.hidden_norm(model.fc(batch.taps.to(dtype)))
    tokens = slot_tokens(model.shape, batch, slots)
    hidden = model.embed(tokens, embeddings).to(context.dtype)
    positions = batch.key_positions[batch.start_index, None] + 1 + torch.arange(slots, device=tokens.device)
    for number, layer in enumerate(model.each_layer()):
        attention = layer.self_attn
        states = layer.input_layernorm(hidden)
        attended = block_attention(
            attention.queries(states, positions),
            attention.keys_values(context, batch.key_positions),
            attention.keys_values(states, positions),
            layer_mask(model.shape, number, batch),
            attention.attention_sink_bias,
        )
        hidden = layer.finish(hidden, attended)
    return hidden


def slot_tokens(shape: BlockShape, batch: Batch, slots: int) -> Tensor:
    """Return the tokens [S, slots] int64 that the slots read: the anchor, then mask tokens."""
    tokens = torch.full((batch.start_index.shape[0], slots), shape.mask_token_id, device=batch.step_tokens.device)
    tokens[:, 0] = batch.step_tokens[:, 0]
    return tokens


def layer_mask(shape: BlockShape, layer: int, batch: Batch) -> BlockMask:
    """Return what the slots see in a layer. The window of a full layer is the batch's, which reaches a conversation."""
    sliding = shape.layer_types[layer] == "sliding"
    assert shape.window is not None or not sliding, "the shape has checked it"
    return BlockMask(
        start_rows=batch.start_index,
        start_positions=batch.key_positions[batch.start_index].int(),
        positions=batch.key_positions.int(),
        window=int(shape.window or 0) if sliding else batch.window,
        causal=shape.causal[layer],
    )
