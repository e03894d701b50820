"""The GPU memory of training a block draft with the fused pass, computed from its allocations in their order.

This follows `fused_pass` and `fused_head` line by line, and leaves out tensors with only a few numbers per row. The
result is what PyTorch allocates: CUDA's context (about half a GB) and fragmentation come on top.

Shape suffixes are those of `fused_pass`: R context rows, S blocks, B slots, T slot rows of a slice, H hidden, N query
heads, G key-value heads, D head width, I intermediate, V draft vocabulary, M Markov rank.
"""

from __future__ import annotations

from dataclasses import dataclass

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.drafts.block.choose_pass import pass_settings
from draftcache.draft_train.drafts.block.kernels.key_gradients import PART_BYTES
from draftcache.draft_train.drafts.block.shape import BlockShape
from draftcache.draft_train.drafts.memory_ledger import MemoryLedger
from draftcache.draft_train.drafts.sizes import BatchRows

BF16, FLOAT32, INT64 = 2, 4, 8


@dataclass(frozen=True)
class _Sizes:
    """The sizes of a slice and of a row's projections."""

    context: int
    """R."""
    blocks: int
    """Blocks of a slice."""
    slots: int
    """T."""
    head_rows: int
    """Rows whose logits exist at once."""
    queries: int
    """N D."""
    keys: int
    """2 G D."""
    recompute_mlp: bool


def parameters(shape: BlockShape) -> int:
    """Return the number of trained parameters of the draft."""
    hidden = shape.hidden_size
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    layer = hidden * (2 * queries + 2 * keys + 3 * shape.intermediate_size + 2) + 2 * shape.head_dim
    layer += shape.num_attention_heads * shape.attention_sinks
    heads = shape.markov_rank * (shape.vocab_size + shape.draft_vocab_size)
    heads += hidden * (shape.draft_vocab_size * shape.train_head + shape.vocab_size * shape.train_embeddings)
    heads += (hidden + shape.markov_rank + 1) * shape.confidence_head
    return hidden * (shape.taps * hidden + 2) + shape.num_hidden_layers * layer + heads


def peak_bytes(shape: BlockShape, config: TrainConfig, batch: BatchRows) -> dict[str, int]:
    """Return the bytes of each kind (`MEMORY_KINDS`) at the moment when their sum is largest."""
    settings = pass_settings(config)
    starts = max(1, round(batch.starts * config.anchor_share))
    blocks = min(starts, max(1, settings.slot_rows // shape.block_size))
    sizes = _Sizes(
        context=batch.rows,
        blocks=blocks,
        slots=blocks * shape.block_size,
        head_rows=min(settings.rows, blocks * shape.steps),
        queries=shape.num_attention_heads * shape.head_dim,
        keys=2 * shape.num_key_value_heads * shape.head_dim,
        recompute_mlp=settings.recompute_mlp,
    )
    memory = MemoryLedger()
    head = shape.draft_vocab_size * (shape.hidden_size + shape.markov_rank) * BF16
    memory.take("weights and optimizer", "", parameters(shape) * (4 * FLOAT32 + BF16) + head)
    frozen = (shape.vocab_size + shape.draft_vocab_size + 1) * shape.hidden_size * BF16
    buffer = 0 if shape.train_head else shape.draft_vocab_size * shape.hidden_size * FLOAT32
    memory.take("frozen weights", "", frozen + buffer + (1 + INT64) * shape.vocab_size + INT64 * shape.draft_vocab_size)
    size = _batch_bytes(shape, batch, starts)
    memory.take("micro-batch", "", size)
    memory.take("next micro-batch", "", size)
    _context(memory, shape, sizes)
    _slice(memory, shape, sizes, batch.top_k)
    _context_backward(memory, shape, sizes)
    return memory.peak()


def _batch_bytes(shape: BlockShape, batch: BatchRows, starts: int) -> int:
    """Return the bytes of a `Batch` on the device."""
    per_row = shape.taps * shape.hidden_size * BF16 + 2 * INT64
    per_start = (3 + 2 * shape.steps) * INT64
    states = 0 if batch.top_k else shape.hidden_size * BF16
    per_teacher = batch.top_k * (INT64 + FLOAT32) + states + 2 * FLOAT32 + 2 * INT64
    return batch.rows * per_row + starts * per_start + batch.starts * per_teacher


def _context(memory: MemoryLedger, shape: BlockShape, sizes: _Sizes) -> None:
    """Take what all slices read, and the gradients that they add to."""
    rows, layers = sizes.context, shape.num_hidden_layers
    memory.take("kept for backward", "states", 2 * rows * shape.hidden_size * BF16)
    memory.take("kept for backward", "table", rows * shape.head_dim * FLOAT32)
    memory.take("kept for backward", "keys", 2 * layers * rows * sizes.keys * BF16)
    memory.take("kept for backward", "gradients of keys", layers * rows * sizes.keys * FLOAT32)


def _slice(memory: MemoryLedger, shape: BlockShape, sizes: _Sizes, top_k: int) -> None:
    """Take what one slice needs: all layers forward, the heads, and all layers backward."""
    slots, hidden = sizes.slots, sizes.slots * shape.hidden_size * BF16
    gate_up, inner = 2 * slots * shape.intermediate_size * BF16, slots * shape.intermediate_size * BF16
    queries, keys = slots * sizes.queries * BF16, slots * sizes.keys * BF16
    sums = slots * shape.num_attention_heads * FLOAT32
    memory.take("kept for backward", "slots", slots * (shape.head_dim * FLOAT32 + 2 * INT64) + hidden)
    kept = queries + keys + queries + keys + queries + sums + 2 * hidden  # projected; q and kv; out; after and result
    kept_mlp = 0 if sizes.recompute_mlp else gate_up
    for layer in range(shape.num_hidden_layers):
        memory.working(normed=hidden)
        memory.take("kept for backward", f"layer {layer}", kept - 2 * hidden)
        memory.done("normed")
        memory.take("kept for backward", f"layer {layer}", kept - hidden + kept_mlp)
        memory.working(normed=hidden, gate_up=gate_up - kept_mlp, inner=inner, result=hidden)
        memory.done("normed", "gate_up", "inner", "result")
        memory.take("kept for backward", f"layer {layer}", kept + kept_mlp)
    _heads(memory, shape, sizes, top_k)
    parts = min(PART_BYTES, 11 * sizes.context * sizes.keys * FLOAT32)
    for layer in reversed(range(shape.num_hidden_layers)):
        memory.working(normed=hidden, again=gate_up - kept_mlp, inner=inner, given=hidden, after=hidden)
        memory.done("normed", "again", "inner", "given", "upstream")
        memory.take("kept for backward", f"layer {layer}", kept)
        memory.working(given=queries, q_gradient=queries, delta=sums, parts=parts)
        memory.done("parts")
        memory.working(kv_gradient=keys)
        memory.done("given", "delta")
        memory.working(projected=queries + keys)
        memory.done("q_gradient", "kv_gradient")
        memory.working(normed=hidden)
        memory.done("normed")
        memory.working(given=hidden, upstream=hidden)
        memory.done("given", "projected", "after")
        memory.give("kept for backward", f"layer {layer}")
    memory.done("upstream")
    memory.give("kept for backward", "slots")


def _heads(memory: MemoryLedger, shape: BlockShape, sizes: _Sizes, top_k: int) -> None:
    rows, width = sizes.head_rows, shape.hidden_size + shape.markov_rank
    memory.working(upstream=sizes.slots * shape.hidden_size * BF16)
    memory.working(chosen=rows * shape.hidden_size * BF16, inputs=rows * width * BF16)
    memory.working(logits=rows * shape.draft_vocab_size * FLOAT32, gradient=rows * shape.draft_vocab_size * BF16)
    memory.working(entries=rows * top_k * (4 * FLOAT32 + INT64))
    memory.done("logits", "entries")
    memory.working(given=rows * width * BF16, narrow=2 * rows * shape.hidden_size * BF16)
    memory.done("chosen", "inputs", "gradient", "given", "narrow")


def _context_backward(memory: MemoryLedger, shape: BlockShape, sizes: _Sizes) -> None:
    states, keys = sizes.context * shape.hidden_size * BF16, sizes.context * sizes.keys
    memory.working(given=states, gradient=keys * BF16)
    memory.done("gradient")
    memory.working(base=states)
    memory.done("given", "base")
