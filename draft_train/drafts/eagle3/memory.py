"""The GPU memory of training with the fused pass, computed before anything runs from its allocations in their order.

This follows `fused_pass` and `head_loss` line by line, and leaves out tensors with only a few numbers per row. The
result is what PyTorch allocates: CUDA's context (about half a GB) and fragmentation come on top.

Shape suffixes are those of `fused_pass`: R key rows, S start rows, H hidden, N query heads, G key-value heads, D head
width.
"""

from __future__ import annotations

from dataclasses import dataclass

from draftcache.draft_train.drafts.eagle3.shape import Eagle3Shape
from draftcache.draft_train.drafts.memory_ledger import MemoryLedger

BF16, FLOAT32, INT64 = 2, 4, 8
MOST_COPIES = 4
"""Most keys of all runs of rows together, as a multiple of R. Copying more keys costs more than it saves."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The size of a micro-batch, and the settings that trade memory for time."""

    rows: int
    """R."""
    starts: int
    """S. Every unroll step is assumed to have this many rows."""
    steps: int
    top_k: int
    """Teacher entries per start row; 0 where the store has final-norm states instead."""
    slice_rows: int
    mlp_rows: int
    """This and `slice_rows` are `mlp_rows` and `rows` of `FusedPassSettings`."""
    recompute_mlp: bool = False
    flash_attention: bool = False
    prefetched: bool = True
    """Whether the next micro-batch is already on the device, as in `draftcache train`."""


def peak_bytes(shape: Eagle3Shape, work: Work) -> dict[str, int]:
    """Return the bytes of each kind (`MEMORY_KINDS`) at the moment when their sum is largest."""
    memory = MemoryLedger()
    weights = parameters(shape)
    # Parameter, gradient and two moments in float32, and a bf16 copy for the products.
    memory.take("weights and optimizer", "", weights * (4 * FLOAT32 + BF16))
    frozen = (shape.vocab_size + shape.draft_vocab_size + 1) * shape.hidden_size * BF16
    memory.take("frozen weights", "", frozen + shape.vocab_size + INT64 * shape.draft_vocab_size)
    memory.take("micro-batch", "", batch_bytes(shape, work))
    memory.take("next micro-batch", "", batch_bytes(shape, work) if work.prefetched else 0)
    _forward(memory, shape, work)
    _backward(memory, shape, work)
    return memory.peak()


def parameters(shape: Eagle3Shape) -> int:
    """Return the number of trained parameters of the draft."""
    hidden, heads = shape.hidden_size, _widths(shape)
    attention = hidden * (2 * heads.projected + heads.queries)
    mlp = 3 * hidden * shape.intermediate_size
    norms = 4 + (shape.taps if shape.fc_norm else 0)
    return hidden * (shape.taps * hidden + shape.draft_vocab_size + norms) + attention + mlp


def batch_bytes(shape: Eagle3Shape, work: Work) -> int:
    """Return the bytes of a `Batch` on the device."""
    per_row = shape.taps * shape.hidden_size * BF16 + 2 * INT64
    per_start = (3 + 2 * work.steps) * INT64
    states = 0 if work.top_k else shape.hidden_size * BF16
    per_teacher = work.top_k * (INT64 + FLOAT32) + states + 2 * FLOAT32 + INT64
    return work.rows * per_row + work.starts * (per_start + per_teacher)


def kept_bytes(shape: Eagle3Shape, work: Work) -> int:
    """Return the bytes that a step keeps until its backward pass.

    These are queries, attention output, log-sum-exps, the MLP's input, the result, and gate and up unless recomputed.
    """
    heads, gate_up = _widths(shape), 0 if work.recompute_mlp else 2 * shape.intermediate_size
    wide = 2 * heads.queries + 2 * shape.hidden_size + gate_up
    return work.starts * (wide * BF16 + shape.num_attention_heads * FLOAT32 + 2 * INT64)


@dataclass(frozen=True)
class _Widths:
    """Widths of a projected row."""

    queries: int
    """N D."""
    keys: int
    """2 G D: keys and values."""

    @property
    def projected(self) -> int:
        return self.queries + self.keys


def _widths(shape: Eagle3Shape) -> _Widths:
    return _Widths(shape.num_attention_heads * shape.head_dim, 2 * shape.num_key_value_heads * shape.head_dim)


def _forward(memory: MemoryLedger, shape: Eagle3Shape, work: Work) -> None:
    heads, hidden, sliced = _widths(shape), shape.hidden_size * BF16, min(work.mlp_rows, work.starts)
    states, projected = work.starts * hidden, work.starts * heads.projected * BF16
    memory.working(embedded=work.rows * hidden, tokens=work.rows * hidden)
    memory.done("embedded")
    memory.take("kept for backward", "base", work.rows * heads.projected * BF16)
    memory.done("tokens")
    if shape.fc_norm:
        _normed_taps(memory, shape, work)
    table = work.rows * shape.head_dim * FLOAT32
    shared = heads.projected + shape.hidden_size + heads.keys
    memory.take("kept for backward", "base", work.rows * shared * BF16 + table)
    memory.take("kept for backward", "diagonal keys", (work.steps - 1) * work.starts * heads.keys * BF16)
    gate_up = 2 * shape.intermediate_size if work.recompute_mlp else 0
    for step in range(work.steps):
        memory.working(input=states, normed=states, projected=projected)
        memory.take("kept for backward", f"step {step}", work.starts * heads.queries * BF16)
        memory.done("normed", "projected")
        memory.take("kept for backward", f"step {step}", kept_bytes(shape, work))
        memory.working(mlp=sliced * (hidden + (gate_up + shape.intermediate_size) * BF16))
        memory.done("mlp", "input")


def _backward(memory: MemoryLedger, shape: Eagle3Shape, work: Work) -> None:
    heads, hidden, sliced = _widths(shape), shape.hidden_size * BF16, min(work.slice_rows, work.starts)
    of_mlp = min(work.mlp_rows, work.starts)
    states, queries = work.starts * hidden, work.starts * heads.queries * BF16
    logits, entries = shape.draft_vocab_size * (FLOAT32 + BF16), work.top_k * (3 * FLOAT32 + INT64)
    gate_up = 2 * shape.intermediate_size * BF16
    held, again = (0, gate_up) if work.recompute_mlp else (gate_up, 0)
    memory.working(carried=0)
    for step in reversed(range(work.steps)):
        kept = f"step {step}"
        memory.working(normed_gradient=states, loss=sliced * (logits + entries + hidden))
        memory.done("loss")
        memory.working(upstream=states)
        memory.done("normed_gradient")
        rest = kept_bytes(shape, work) - states  # the step's result is freed
        memory.take("kept for backward", kept, rest)
        memory.working(after=states, mlp=of_mlp * (again + shape.intermediate_size * BF16 + 3 * hidden))
        memory.done("mlp", "upstream")
        memory.take("kept for backward", kept, rest - work.starts * held)
        memory.working(given=queries)
        if step == work.steps - 1:
            numbers = work.rows + (work.steps - 1) * work.starts
            memory.take("working", "gradients of keys", numbers * heads.keys * FLOAT32)
        memory.working(delta=work.starts * shape.num_attention_heads * FLOAT32)
        if work.flash_attention:
            # The queries' gradient, which is not in the output's memory, and its sums in float32; the runs' keys, and
            # their gradients in bf16 and float32.
            sums = queries * FLOAT32 // BF16 + MOST_COPIES * work.rows * heads.keys * (FLOAT32 + 2 * BF16)
            memory.working(of_queries=queries, sums=sums)
            memory.done("of_queries", "sums")
        memory.done("delta", "given")
        # What is left is the MLP's input, and the queries' gradient in the memory of the attention output.
        memory.take("kept for backward", kept, states + queries)
        if step:
            of_norm = states if shape.norm_output else 0
            memory.working(input=of_norm, projected=work.starts * heads.projected * BF16, normed=states)
            memory.done("normed")
            memory.working(given=states)
            memory.done("projected")
            memory.working(of_input=of_norm)
            memory.done("given")
            memory.working(carried=states)
            memory.done("input", "of_input", "after")
        else:
            memory.working(asked=queries, shared=work.rows * heads.keys * BF16, normed=work.rows * hidden)
            memory.working(given=work.rows * hidden, residual=work.rows * hidden, base=work.rows * hidden)
            if shape.fc_norm:
                _normed_taps(memory, shape, work)
        memory.give("kept for backward", kept)


def _normed_taps(memory: MemoryLedger, shape: Eagle3Shape, work: Work) -> None:
    """Make fc's input of the taps, one after the other, and free it."""
    tap = work.rows * shape.hidden_size * BF16
    memory.working(fc_input=shape.taps * tap, tap=tap, normed_tap=tap)
    memory.done("fc_input", "tap", "normed_tap")
