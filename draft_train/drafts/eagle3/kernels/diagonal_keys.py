"""The Triton kernels for diagonal keys, which only the row that made them sees.

Shape suffixes are those of `attention`: T query rows, S start rows, N query heads, G key-value heads, D head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from draftcache.draft_train.drafts.eagle3.kernels.attention_result import AttentionResult
from draftcache.draft_train.drafts.eagle3.kernels.step_mask import StepMask
from draftcache.store.common.triton_launch import jit, power_of_two, tl

_SIZES = ("queries", "slots", "step")
_ROWS = 16
"""Rows of one program that computes keys' gradients, head by head. More would take registers from a second program."""
_PAIRS = 16
"""Pairs of a row and a head in one program. A group's heads are together, so that a row's keys are loaded once."""


def merge_diagonal(q: Tensor, diagonal: Tensor, mask: StepMask, out: Tensor, log_sum_exp: Tensor) -> None:
    """Merge diagonal keys in place into `out` [T, N, D] and `log_sum_exp` [N, T], which are over step-0 keys alone."""
    grid, shape = _launch(q, diagonal)
    _merge_diagonal_kernel[grid](
        q, diagonal, mask.rows, out, log_sum_exp, q.shape[0], diagonal.shape[1], mask.step, 1.0 /
        math.sqrt(q.shape[2]), **shape, num_warps=8,
    )  # fmt: skip


def diagonal_gradients(
    upstream: Tensor, result: AttentionResult, q_gradient: Tensor, diagonal_gradient: Tensor
) -> None:
    """Add the diagonal keys' part to `q_gradient` [T, N, D], and their gradients to `diagonal_gradient`."""
    q, diagonal, mask = result.q, result.diagonal, result.mask
    delta = torch.empty_like(result.log_sum_exp)
    grid, shape = _launch(q, diagonal)
    _diagonal_query_gradient_kernel[grid](
        upstream, q, diagonal, mask.rows, result.out, result.log_sum_exp, delta, q_gradient, q.shape[0],
        diagonal.shape[1], mask.step, 1.0 / math.sqrt(q.shape[2]), **shape, num_warps=8,
    )  # fmt: skip
    diagonal_key_gradients(upstream, result, delta, diagonal_gradient)


def diagonal_key_gradients(upstream: Tensor, result: AttentionResult, delta: Tensor, diagonal_gradient: Tensor) -> None:
    """Add the gradients of diagonal keys and values to `diagonal_gradient` [steps, S, 2, G, D].

    `delta` [N, T] holds each row's sum of `upstream` times output.
    """
    q, diagonal, mask = result.q, result.diagonal, result.mask
    rows, heads, width = q.shape
    _diagonal_key_gradient_kernel[(mask.step, -(-rows // _ROWS), diagonal.shape[3])](
        upstream, q, diagonal, mask.rows, result.log_sum_exp, delta, diagonal_gradient, rows, diagonal.shape[1],
        1.0 / math.sqrt(width), HEADS=heads, GROUPS=diagonal.shape[3], WIDTH=width, ROWS=_ROWS, num_warps=8,
    )  # fmt: skip


def _launch(q: Tensor, diagonal: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Return the grid (tiles of rows, groups), and the constants of the kernels over pairs of a row and a head."""
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
    """Continue the online softmax over the diagonal keys."""
    column = tl.arange(0, WIDTH)[None, :]
    for number in range(step):
        pointer = diagonal + (number * slots + slot)[:, None] * (2 * GROUPS * WIDTH) + group * WIDTH + column
        score = tl.sum(q_tile.to(tl.float32) * tl.load(pointer).to(tl.float32), 1) * scale_2
        above = tl.maximum(largest, score)
        raised = tl.exp2(score - above)
        shrink = tl.exp2(largest - above)
        total = total * shrink + raised
        acc = acc * shrink[:, None] + raised[:, None] * tl.load(pointer + GROUPS * WIDTH).to(tl.float32)
        largest = above
    return acc, largest, total


@jit
def diagonal_query_part(
    acc, q_tile, up_tile, diagonal, slot, slots, group, step, log_2, delta, scale_2,
    GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add the queries' gradient through the diagonal keys, not yet scaled, to `acc`."""
    column = tl.arange(0, WIDTH)[None, :]
    for number in range(step):
        pointer = diagonal + (number * slots + slot)[:, None] * (2 * GROUPS * WIDTH) + group * WIDTH + column
        k_diagonal = tl.load(pointer).to(tl.float32)
        p = tl.exp2(tl.sum(q_tile.to(tl.float32) * k_diagonal, 1) * scale_2 - log_2)
        v_diagonal = tl.load(pointer + GROUPS * WIDTH).to(tl.float32)
        gradient = p * (tl.sum(up_tile.to(tl.float32) * v_diagonal, 1) - delta)
        acc += gradient[:, None] * k_diagonal
    return acc


@jit
def _pairs(queries, HEADS: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr, TURNS: tl.constexpr):
    """Return row and head of each pair of this program, and whether it exists. If not, both are clamped."""
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
    offset = (row.to(tl.int64) * HEADS + head)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    acc = tl.load(out + offset).to(tl.float32)
    largest = tl.load(log_sum_exp + head * queries + row) * 1.4426950408889634
    acc, largest, total = diagonal_part(
        acc, largest, tl.full((ROWS * TURNS,), 1.0, tl.float32), tl.load(q + offset), diagonal, tl.load(rows + row),
        slots, tl.program_id(1), step, scale * 1.4426950408889634, GROUPS, WIDTH,
    )  # fmt: skip
    tl.store(out + offset, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(log_sum_exp + head * queries + row, (largest + tl.log2(total)) * 0.6931471805599453, mask=inside)


@jit(varying=_SIZES)
def _diagonal_query_gradient_kernel(
    upstream, q, diagonal, rows, out, log_sum_exp, deltas, q_gradient, queries, slots, step, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TURNS: tl.constexpr,
):  # fmt: skip
    row, head, inside = _pairs(queries, HEADS, GROUPS, ROWS, TURNS)
    offset = (row.to(tl.int64) * HEADS + head)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    up_tile = tl.load(upstream + offset)
    delta = tl.sum(up_tile.to(tl.float32) * tl.load(out + offset).to(tl.float32), 1)
    tl.store(deltas + head * queries + row, delta, mask=inside)
    acc = diagonal_query_part(
        tl.zeros((ROWS * TURNS, WIDTH), tl.float32), tl.load(q + offset), up_tile, diagonal, tl.load(rows + row), slots,
        tl.program_id(1), step, tl.load(log_sum_exp + head * queries + row) * 1.4426950408889634, delta,
        scale * 1.4426950408889634, GROUPS, WIDTH,
    )  # fmt: skip
    total = tl.load(q_gradient + offset).to(tl.float32) + acc * scale
    tl.store(q_gradient + offset, total.to(q_gradient.dtype.element_ty), mask=inside[:, None])


@jit(varying=_SIZES[:2])
def _diagonal_key_gradient_kernel(
    upstream, q, diagonal, rows, log_sum_exp, deltas, diagonal_gradient, queries, slots, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # Programs that differ only in the step run at the same time, and find queries and gradients in the cache.
    number, tile, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column = tl.arange(0, WIDTH)[None, :]
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < queries
    near = tl.minimum(row, queries - 1)
    offset = (number * slots + tl.load(rows + near))[:, None] * (2 * GROUPS * WIDTH) + group * WIDTH + column
    k_diagonal = tl.load(diagonal + offset).to(tl.float32)
    v_diagonal = tl.load(diagonal + offset + GROUPS * WIDTH).to(tl.float32)
    k_acc = tl.zeros((ROWS, WIDTH), tl.float32)
    v_acc = tl.zeros((ROWS, WIDTH), tl.float32)
    scale_2 = scale * 1.4426950408889634
    for turn in range(HEADS // GROUPS):
        head = group * (HEADS // GROUPS) + turn
        q_offset = near.to(tl.int64)[:, None] * (HEADS * WIDTH) + head * WIDTH + column
        q_tile = tl.load(q + q_offset).to(tl.float32)
        up_tile = tl.load(upstream + q_offset).to(tl.float32)
        log_2 = tl.load(log_sum_exp + head * queries + near) * 1.4426950408889634
        p = tl.exp2(tl.sum(q_tile * k_diagonal, 1) * scale_2 - log_2)
        gradient = p * (tl.sum(up_tile * v_diagonal, 1) - tl.load(deltas + head * queries + near))
        k_acc += gradient[:, None] * q_tile
        v_acc += p[:, None] * up_tile
    held = inside[:, None]
    k_pointer = diagonal_gradient + offset
    v_pointer = k_pointer + GROUPS * WIDTH
    tl.store(k_pointer, tl.load(k_pointer, mask=held, other=0.0) + k_acc * scale, mask=held)
    tl.store(v_pointer, tl.load(v_pointer, mask=held, other=0.0) + v_acc, mask=held)
