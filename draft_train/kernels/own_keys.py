"""The Triton kernels of keys that only one row sees: its own of earlier steps. Shape suffixes as in `attention`."""

from __future__ import annotations

import math

from torch import Tensor

from draft_train.kernels.sight import Attended, Sight
from store.triton_launch import jit, power_of_two, tl

_SIZES = ("queries", "slots", "step")
_PAIRS = 32
"""Of a row and a head in one program. Heads of a group go together, so that their row's own keys are fetched once."""


def merge_own(q: Tensor, own: Tensor, sight: Sight, out: Tensor, log_sum_exp: Tensor) -> None:
    """Count a row's own keys in, in place: `out` [T, N, D] and `log_sum_exp` [N, T] are those of step-0 keys alone."""
    grid, shape = _launch(q, own)
    _merge_own_kernel[grid](
        q, own, sight.rows, out, log_sum_exp, q.shape[0], own.shape[1], sight.step, 1.0 / math.sqrt(q.shape[2]),
        **shape, num_warps=8,
    )  # fmt: skip


def own_gradients(upstream: Tensor, held: Attended, q_gradient: Tensor, own_gradient: Tensor) -> None:
    """Add the part of a row's own keys to `q_gradient` [T, N, D], and their gradients to `own_gradient`."""
    _add_gradients(upstream, held, None, q_gradient, own_gradient)


def own_key_gradients(upstream: Tensor, held: Attended, delta: Tensor, own_gradient: Tensor) -> None:
    """Add gradients of rows' own keys and values; `delta` [N, T]: sums of upstream times output."""
    _add_gradients(upstream, held, delta, None, own_gradient)


def _add_gradients(
    upstream: Tensor, held: Attended, delta: Tensor | None, q_gradient: Tensor | None, own_gradient: Tensor
) -> None:
    """Without `delta` it is made of the output."""
    q, own, sight = held.q, held.own, held.sight
    grid, shape = _launch(q, own)
    _own_gradient_kernel[grid](
        upstream, q, own, sight.rows, held.out, held.log_sum_exp, held.log_sum_exp if delta is None else delta,
        q if q_gradient is None else q_gradient, own_gradient, q.shape[0], own.shape[1], sight.step,
        1.0 / math.sqrt(q.shape[2]), HAS_DELTA=delta is not None, OF_QUERIES=q_gradient is not None, **shape,
        num_warps=8,
    )  # fmt: skip


def _launch(q: Tensor, own: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid (tiles of rows, groups), and the kernels' constants."""
    rows, heads, width = q.shape
    groups = own.shape[3]
    turns = power_of_two(heads // groups)
    tile = max(1, _PAIRS // turns)
    shape = {"HEADS": heads, "GROUPS": groups, "WIDTH": width, "ROWS": tile, "TURNS": turns}
    return (-(-rows // tile), groups), shape


@jit
def own_part(
    acc, largest, total, q_tile, own, slot, slots, group, step, scale_2, GROUPS: tl.constexpr, WIDTH: tl.constexpr
):
    """Online softmax over a row's own keys."""
    column = tl.arange(0, WIDTH)[None, :]
    for number in range(step):
        place = own + (number * slots + slot)[:, None] * (2 * GROUPS * WIDTH) + group * WIDTH + column
        score = tl.sum(q_tile.to(tl.float32) * tl.load(place).to(tl.float32), 1) * scale_2
        above = tl.maximum(largest, score)
        raised = tl.exp2(score - above)
        shrink = tl.exp2(largest - above)
        total = total * shrink + raised
        acc = acc * shrink[:, None] + raised[:, None] * tl.load(place + GROUPS * WIDTH).to(tl.float32)
        largest = above
    return acc, largest, total


@jit
def own_query_part(
    acc, q_tile, up_tile, own, slot, slots, group, step, log_2, delta, scale_2,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The queries' gradient from a row's own keys, not yet scaled."""
    column = tl.arange(0, WIDTH)[None, :]
    for number in range(step):
        place = own + (number * slots + slot)[:, None] * (2 * GROUPS * WIDTH) + group * WIDTH + column
        k_own = tl.load(place).to(tl.float32)
        p = tl.exp2(tl.sum(q_tile.to(tl.float32) * k_own, 1) * scale_2 - log_2)
        v_own = tl.load(place + GROUPS * WIDTH).to(tl.float32)
        gradient = p * (tl.sum(up_tile.to(tl.float32) * v_own, 1) - delta)
        acc += gradient[:, None] * k_own
    return acc


@jit
def _pairs(queries, HEADS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, TURNS: tl.constexpr):
    """Row and head of each pair of this program, and whether there is one: where not, they are near ones."""
    pair = tl.arange(0, ROWS * TURNS)
    row = tl.program_id(0) * ROWS + pair // TURNS
    turn = pair % TURNS
    head = tl.program_id(1) * (HEADS // GROUPS) + tl.minimum(turn, HEADS // GROUPS - 1)
    return tl.minimum(row, queries - 1), head, (row < queries) & (turn < HEADS // GROUPS)


@jit(varying=_SIZES)
def _merge_own_kernel(
    q, own, rows, out, log_sum_exp, queries, slots, step, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    row, head, inside = _pairs(queries, HEADS, GROUPS, ROWS, TURNS)
    place = (row.to(tl.int64) * HEADS + head)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    acc = tl.load(out + place).to(tl.float32)
    largest = tl.load(log_sum_exp + head * queries + row) * 1.4426950408889634
    acc, largest, total = own_part(
        acc, largest, tl.full((ROWS * TURNS,), 1.0, tl.float32), tl.load(q + place), own, tl.load(rows + row), slots,
        tl.program_id(1), step, scale * 1.4426950408889634, GROUPS, WIDTH,
    )  # fmt: skip
    tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(log_sum_exp + head * queries + row, (largest + tl.log2(total)) * 0.6931471805599453, mask=inside)


@jit(varying=_SIZES)
def _own_gradient_kernel(
    upstream, q, own, rows, out, log_sum_exp, deltas, q_gradient, own_gradient, queries, slots, step, scale,
    HAS_DELTA: tl.constexpr, OF_QUERIES: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    row, head, inside = _pairs(queries, HEADS, GROUPS, ROWS, TURNS)
    column = tl.arange(0, WIDTH)[None, :]
    place = (row.to(tl.int64) * HEADS + head)[:, None] * WIDTH + column
    q_tile = tl.load(q + place).to(tl.float32)
    up_tile = tl.load(upstream + place).to(tl.float32)
    if HAS_DELTA:
        delta = tl.load(deltas + head * queries + row)
    else:
        delta = tl.sum(up_tile * tl.load(out + place).to(tl.float32), 1)
    log_2 = tl.load(log_sum_exp + head * queries + row) * 1.4426950408889634
    scale_2 = scale * 1.4426950408889634
    group = tl.program_id(1) * WIDTH + column
    slot = tl.load(rows + row)
    one_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    held = (one_row < queries)[:, None]
    one_slot = tl.load(rows + tl.minimum(one_row, queries - 1))
    acc = tl.zeros((ROWS * TURNS, WIDTH), tl.float32)
    for number in range(step):
        key = own + (number * slots + slot)[:, None] * (2 * GROUPS * WIDTH) + group
        k_own = tl.load(key).to(tl.float32)
        p = tl.exp2(tl.sum(q_tile * k_own, 1) * scale_2 - log_2)
        p = tl.where(inside, p, 0.0)
        gradient = p * (tl.sum(up_tile * tl.load(key + GROUPS * WIDTH).to(tl.float32), 1) - delta)
        acc += gradient[:, None] * k_own
        k_part = tl.sum(tl.reshape(gradient[:, None] * q_tile, (ROWS, TURNS, WIDTH)), 1) * scale
        v_part = tl.sum(tl.reshape(p[:, None] * up_tile, (ROWS, TURNS, WIDTH)), 1)
        k_place = own_gradient + (number * slots + one_slot)[:, None] * (2 * GROUPS * WIDTH) + group
        v_place = k_place + GROUPS * WIDTH
        tl.store(k_place, tl.load(k_place, mask=held, other=0.0) + k_part, mask=held)
        tl.store(v_place, tl.load(v_place, mask=held, other=0.0) + v_part, mask=held)
    if OF_QUERIES:
        total = tl.load(q_gradient + place).to(tl.float32) + acc * scale
        tl.store(q_gradient + place, total.to(q_gradient.dtype.element_ty), mask=inside[:, None])
