"""The Triton kernels of keys that only one row sees: its own of earlier steps. Shape suffixes as in `attention`."""

from __future__ import annotations

import math

from torch import Tensor

from draft_train.kernels.sight import Attended, Sight
from store.triton_launch import jit, power_of_two, tl

_SIZES = ("queries", "slots", "step")
_VALUES = 4096
"""Of own keys in one program: all steps of some rows, which stay in registers while the heads of a group go by."""


def merge_own(q: Tensor, own: Tensor, sight: Sight, out: Tensor, log_sum_exp: Tensor) -> None:
    """Count a row's own keys in, in place: `out` [T, N, D] and `log_sum_exp` [N, T] are those of step-0 keys alone."""
    tiles, shape = _launch(q, own, sight)
    _merge_own_kernel[(tiles, own.shape[3])](
        q, own, sight.rows, out, log_sum_exp, q.shape[0], own.shape[1], sight.step, 1.0 / math.sqrt(q.shape[2]), **shape
    )


def own_gradients(upstream: Tensor, held: Attended, q_gradient: Tensor, own_gradient: Tensor) -> None:
    """Add the part of a row's own keys to `q_gradient` [T, N, D], and their gradients to `own_gradient`."""
    _own_gradients(upstream, held, held.log_sum_exp, q_gradient, own_gradient, of_queries=True)


def own_key_gradients(upstream: Tensor, held: Attended, delta: Tensor, own_gradient: Tensor) -> None:
    """Add gradients of rows' own keys and values; `delta` [N, T]: sums of upstream times output."""
    _own_gradients(upstream, held, delta, held.out, own_gradient, of_queries=False)


def _own_gradients(
    upstream: Tensor, held: Attended, delta: Tensor, q_gradient: Tensor, own_gradient: Tensor, *, of_queries: bool
) -> None:
    """`delta` is read only without `of_queries`, `q_gradient` and the output only with it."""
    q, own, sight = held.q, held.own, held.sight
    tiles, shape = _launch(q, own, sight)
    _own_gradient_kernel[(tiles, own.shape[3])](
        upstream, q, own, sight.rows, held.out, held.log_sum_exp, delta, q_gradient, own_gradient, q.shape[0],
        own.shape[1], sight.step, 1.0 / math.sqrt(q.shape[2]), OF_QUERIES=of_queries, **shape,
    )  # fmt: skip


def _launch(q: Tensor, own: Tensor, sight: Sight) -> tuple[int, dict[str, int]]:
    """Tiles of rows, and the kernels' constants."""
    steps = power_of_two(sight.step)
    rows = max(1, _VALUES // (steps * q.shape[2]))
    shape = {"HEADS": q.shape[1], "GROUPS": own.shape[3], "WIDTH": q.shape[2], "ROWS": rows, "STEPS": steps}
    return -(-q.shape[0] // rows), {**shape, "num_warps": 4}


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
def _own_places(rows, slots, step, group, row, inside, STEPS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Where keys [STEPS, ROWS, WIDTH] lie (values: GROUPS * WIDTH behind them), and which [STEPS, ROWS] there are."""
    number = tl.arange(0, STEPS)[:, None]
    slot = tl.load(rows + row)[None, :]
    key = (number * slots + slot) * (2 * GROUPS * WIDTH) + group * WIDTH
    return key[:, :, None] + tl.arange(0, WIDTH)[None, None, :], (number < step) & inside[None, :]


@jit(varying=_SIZES)
def _merge_own_kernel(
    q, own, rows, out, log_sum_exp, queries, slots, step, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    tile, group = tl.program_id(0), tl.program_id(1)
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < queries
    near = tl.minimum(row, queries - 1)
    own_place, held = _own_places(rows, slots, step, group, near, inside, STEPS, GROUPS, WIDTH)
    k_own = tl.load(own + own_place, mask=held[:, :, None], other=0.0)
    v_own = tl.load(own + own_place + GROUPS * WIDTH, mask=held[:, :, None], other=0.0)
    scale_2 = scale * 1.4426950408889634
    for turn in range(HEADS // GROUPS):
        head = group * (HEADS // GROUPS) + turn
        place = near.to(tl.int64)[:, None] * (HEADS * WIDTH) + head * WIDTH + tl.arange(0, WIDTH)[None, :]
        q_tile = tl.load(q + place).to(tl.float32)
        before = tl.load(log_sum_exp + head * queries + near) * 1.4426950408889634
        score = tl.where(held, tl.sum(q_tile[None, :, :] * k_own.to(tl.float32), 2) * scale_2, float("-inf"))
        largest = tl.maximum(before, tl.max(score, 0))
        kept = tl.exp2(before - largest)
        raised = tl.exp2(score - largest[None, :])
        total = kept + tl.sum(raised, 0)
        acc = tl.load(out + place).to(tl.float32) * kept[:, None]
        acc += tl.sum(raised[:, :, None] * v_own.to(tl.float32), 0)
        tl.store(out + place, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
        tl.store(log_sum_exp + head * queries + row, (largest + tl.log2(total)) * 0.6931471805599453, mask=inside)


@jit(varying=_SIZES)
def _own_gradient_kernel(
    upstream, q, own, rows, out, log_sum_exp, deltas, q_gradient, own_gradient, queries, slots, step, scale,
    OF_QUERIES: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    tile, group = tl.program_id(0), tl.program_id(1)
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < queries
    near = tl.minimum(row, queries - 1)
    own_place, held = _own_places(rows, slots, step, group, near, inside, STEPS, GROUPS, WIDTH)
    k_own = tl.load(own + own_place, mask=held[:, :, None], other=0.0)
    v_own = tl.load(own + own_place + GROUPS * WIDTH, mask=held[:, :, None], other=0.0)
    k_acc = tl.zeros((STEPS, ROWS, WIDTH), tl.float32)
    v_acc = tl.zeros((STEPS, ROWS, WIDTH), tl.float32)
    scale_2 = scale * 1.4426950408889634
    for turn in range(HEADS // GROUPS):
        head = group * (HEADS // GROUPS) + turn
        place = near.to(tl.int64)[:, None] * (HEADS * WIDTH) + head * WIDTH + tl.arange(0, WIDTH)[None, :]
        q_tile = tl.load(q + place).to(tl.float32)[None, :, :]
        up_tile = tl.load(upstream + place).to(tl.float32)
        if OF_QUERIES:
            delta = tl.sum(up_tile * tl.load(out + place).to(tl.float32), 1)
        else:
            delta = tl.load(deltas + head * queries + near)
        log_2 = tl.load(log_sum_exp + head * queries + near) * 1.4426950408889634
        p = tl.exp2(tl.sum(q_tile * k_own.to(tl.float32), 2) * scale_2 - log_2[None, :])
        gradient = p * (tl.sum(up_tile[None, :, :] * v_own.to(tl.float32), 2) - delta[None, :])
        gradient = tl.where(held, gradient, 0.0)
        if OF_QUERIES:
            added = tl.sum(gradient[:, :, None] * k_own.to(tl.float32), 0) * scale
            added += tl.load(q_gradient + place).to(tl.float32)
            tl.store(q_gradient + place, added.to(q_gradient.dtype.element_ty), mask=inside[:, None])
        k_acc += gradient[:, :, None] * q_tile
        v_acc += p[:, :, None] * up_tile[None, :, :]
    k_place = own_gradient + own_place
    v_place = k_place + GROUPS * WIDTH
    tl.store(k_place, tl.load(k_place, mask=held[:, :, None], other=0.0) + k_acc * scale, mask=held[:, :, None])
    tl.store(v_place, tl.load(v_place, mask=held[:, :, None], other=0.0) + v_acc, mask=held[:, :, None])
