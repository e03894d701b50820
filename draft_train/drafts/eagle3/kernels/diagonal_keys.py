"""The Triton kernels of keys that only one row sees: its own of earlier steps. Shape suffixes as in `attention`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from draftcache.draft_train.drafts.eagle3.kernels.sight import Attended, Sight
from draftcache.store.common.triton_launch import jit, power_of_two, tl

_SIZES = ("queries", "slots", "step")
_ROWS = 16
"""In one program of keys' gradients, which goes through the heads: more rows take registers that a second one needs."""
_PAIRS = 16
"""Of a row and a head in one program. Heads of a group go together, so that their row's own keys are fetched once."""


def merge_diagonal(q: Tensor, diagonal: Tensor, sight: Sight, out: Tensor, log_sum_exp: Tensor) -> None:
    """Count a row's own keys in, in place: `out` [T, N, D] and `log_sum_exp` [N, T] are those of step-0 keys alone."""
    grid, shape = _launch(q, diagonal)
    _merge_diagonal_kernel[grid](
        q, diagonal, sight.rows, out, log_sum_exp, q.shape[0], diagonal.shape[1], sight.step, 1.0 /
        math.sqrt(q.shape[2]), **shape, num_warps=8,
    )  # fmt: skip


def diagonal_gradients(upstream: Tensor, held: Attended, q_gradient: Tensor, diagonal_gradient: Tensor) -> None:
    """Add the part of a row's own keys to `q_gradient` [T, N, D], and their gradients to `own_gradient`."""
    q, diagonal, sight = held.q, held.diagonal, held.sight
    delta = torch.empty_like(held.log_sum_exp)
    grid, shape = _launch(q, diagonal)
    _diagonal_query_gradient_kernel[grid](
        upstream, q, diagonal, sight.rows, held.out, held.log_sum_exp, delta, q_gradient, q.shape[0], diagonal.shape[1],
        sight.step, 1.0 / math.sqrt(q.shape[2]), **shape, num_warps=8,
    )  # fmt: skip
    diagonal_key_gradients(upstream, held, delta, diagonal_gradient)


def diagonal_key_gradients(upstream: Tensor, held: Attended, delta: Tensor, diagonal_gradient: Tensor) -> None:
    """Add gradients of rows' own keys and values; `delta` [N, T]: sums of upstream times output."""
    q, diagonal, sight = held.q, held.diagonal, held.sight
    rows, heads, width = q.shape
    _diagonal_key_gradient_kernel[(sight.step, -(-rows // _ROWS), diagonal.shape[3])](
        upstream, q, diagonal, sight.rows, held.log_sum_exp, delta, diagonal_gradient, rows, diagonal.shape[1],
        1.0 / math.sqrt(width), HEADS=heads, GROUPS=diagonal.shape[3], WIDTH=width, ROWS=_ROWS, num_warps=8,
    )  # fmt: skip


def _launch(q: Tensor, diagonal: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid (tiles of rows, groups), and the kernels' constants."""
    rows, heads, width = q.shape
    groups = diagonal.shape[3]
    turns = power_of_two(heads // groups)
    tile = max(1, _PAIRS // turns)
    shape = {"HEADS": heads, "GROUPS": groups, "WIDTH": width, "ROWS": tile, "TURNS": turns}
    return (-(-rows // tile), groups), shape


@jit
def diagonal_part(
    acc, largest, total, q_tile, diagonal, slot, slots, group, step, scale_2, GROUPS: tl.constexpr, WIDTH: tl.constexpr
):
    """Online softmax over a row's own keys."""
    column = tl.arange(0, WIDTH)[None, :]
    for number in range(step):
        place = diagonal + (number * slots + slot)[:, None] * (2 * GROUPS * WIDTH) + group * WIDTH + column
        score = tl.sum(q_tile.to(tl.float32) * tl.load(place).to(tl.float32), 1) * scale_2
        above = tl.maximum(largest, score)
        raised = tl.exp2(score - above)
        shrink = tl.exp2(largest - above)
        total = total * shrink + raised
        acc = acc * shrink[:, None] + raised[:, None] * tl.load(place + GROUPS * WIDTH).to(tl.float32)
        largest = above
    return acc, largest, total


@jit
def diagonal_query_part(
    acc, q_tile, up_tile, diagonal, slot, slots, group, step, log_2, delta, scale_2,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The queries' gradient from a row's own keys, not yet scaled."""
    column = tl.arange(0, WIDTH)[None, :]
    for number in range(step):
        place = diagonal + (number * slots + slot)[:, None] * (2 * GROUPS * WIDTH) + group * WIDTH + column
        k_diagonal = tl.load(place).to(tl.float32)
        p = tl.exp2(tl.sum(q_tile.to(tl.float32) * k_diagonal, 1) * scale_2 - log_2)
        v_diagonal = tl.load(place + GROUPS * WIDTH).to(tl.float32)
        gradient = p * (tl.sum(up_tile.to(tl.float32) * v_diagonal, 1) - delta)
        acc += gradient[:, None] * k_diagonal
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
def _merge_diagonal_kernel(
    q, diagonal, rows, out, log_sum_exp, queries, slots, step, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    row, head, inside = _pairs(queries, HEADS, GROUPS, ROWS, TURNS)
    place = (row.to(tl.int64) * HEADS + head)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    acc = tl.load(out + place).to(tl.float32)
    largest = tl.load(log_sum_exp + head * queries + row) * 1.4426950408889634
    acc, largest, total = diagonal_part(
        acc, largest, tl.full((ROWS * TURNS,), 1.0, tl.float32), tl.load(q + place), diagonal, tl.load(rows + row),
        slots, tl.program_id(1), step, scale * 1.4426950408889634, GROUPS, WIDTH,
    )  # fmt: skip
    tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(log_sum_exp + head * queries + row, (largest + tl.log2(total)) * 0.6931471805599453, mask=inside)


@jit(varying=_SIZES)
def _diagonal_query_gradient_kernel(
    upstream, q, diagonal, rows, out, log_sum_exp, deltas, q_gradient, queries, slots, step, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    row, head, inside = _pairs(queries, HEADS, GROUPS, ROWS, TURNS)
    place = (row.to(tl.int64) * HEADS + head)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    up_tile = tl.load(upstream + place)
    delta = tl.sum(up_tile.to(tl.float32) * tl.load(out + place).to(tl.float32), 1)
    tl.store(deltas + head * queries + row, delta, mask=inside)
    acc = diagonal_query_part(
        tl.zeros((ROWS * TURNS, WIDTH), tl.float32), tl.load(q + place), up_tile, diagonal, tl.load(rows + row), slots,
        tl.program_id(1), step, tl.load(log_sum_exp + head * queries + row) * 1.4426950408889634, delta,
        scale * 1.4426950408889634, GROUPS, WIDTH,
    )  # fmt: skip
    total = tl.load(q_gradient + place).to(tl.float32) + acc * scale
    tl.store(q_gradient + place, total.to(q_gradient.dtype.element_ty), mask=inside[:, None])


@jit(varying=_SIZES[:2])
def _diagonal_key_gradient_kernel(
    upstream, q, diagonal, rows, log_sum_exp, deltas, diagonal_gradient, queries, slots, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # Programs that differ in the step alone run side by side, and find queries and gradients in the cache.
    number, tile, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column = tl.arange(0, WIDTH)[None, :]
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < queries
    near = tl.minimum(row, queries - 1)
    place = (number * slots + tl.load(rows + near))[:, None] * (2 * GROUPS * WIDTH) + group * WIDTH + column
    k_diagonal = tl.load(diagonal + place).to(tl.float32)
    v_diagonal = tl.load(diagonal + place + GROUPS * WIDTH).to(tl.float32)
    k_acc = tl.zeros((ROWS, WIDTH), tl.float32)
    v_acc = tl.zeros((ROWS, WIDTH), tl.float32)
    scale_2 = scale * 1.4426950408889634
    for turn in range(HEADS // GROUPS):
        head = group * (HEADS // GROUPS) + turn
        place_q = near.to(tl.int64)[:, None] * (HEADS * WIDTH) + head * WIDTH + column
        q_tile = tl.load(q + place_q).to(tl.float32)
        up_tile = tl.load(upstream + place_q).to(tl.float32)
        log_2 = tl.load(log_sum_exp + head * queries + near) * 1.4426950408889634
        p = tl.exp2(tl.sum(q_tile * k_diagonal, 1) * scale_2 - log_2)
        gradient = p * (tl.sum(up_tile * v_diagonal, 1) - tl.load(deltas + head * queries + near))
        k_acc += gradient[:, None] * q_tile
        v_acc += p[:, None] * up_tile
    held = inside[:, None]
    k_place = diagonal_gradient + place
    v_place = k_place + GROUPS * WIDTH
    tl.store(k_place, tl.load(k_place, mask=held, other=0.0) + k_acc * scale, mask=held)
    tl.store(v_place, tl.load(v_place, mask=held, other=0.0) + v_acc, mask=held)
