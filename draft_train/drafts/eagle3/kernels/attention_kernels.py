"""The Triton kernels of `attention`, and what their launches need to know."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from draftcache.draft_train.drafts.eagle3.kernels.diagonal_keys import (
    diagonal_key_gradients,
    diagonal_part,
    diagonal_query_part,
)
from draftcache.draft_train.drafts.eagle3.kernels.sight import Attended, Sight
from draftcache.store.common.triton_launch import jit, tl

_SIZES = ("queries", "keys", "slots", "step", "window")

_FORWARD = {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
_QUERIES = {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
_KEYS = {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}


def forward(q: Tensor, kv: Tensor, diagonal: Tensor, sight: Sight) -> tuple[Tensor, Tensor]:
    """See `attention.attend`."""
    rows, heads, width = q.shape
    out = torch.empty_like(q)
    log_sum_exp = torch.empty(heads, rows, device=q.device, dtype=torch.float32)
    launch = _launch(_FORWARD, q)
    spans = sight.key_spans(launch["BLOCK_Q"])
    _attend_kernel[(heads, spans.shape[1])](
        q, kv, diagonal, sight.rows, sight.positions, sight.key_positions, spans, out, log_sum_exp, rows, kv.shape[0],
        diagonal.shape[1], sight.step, sight.window, 1.0 / math.sqrt(width),
        HEADS=heads, GROUPS=kv.shape[2], WIDTH=width, **launch,
    )  # fmt: skip
    return out, log_sum_exp


def backward(upstream: Tensor, held: Attended, kv_gradient: Tensor, diagonal_gradient: Tensor) -> Tensor:
    """See `attention.attend_backward`."""
    q, kv, diagonal, sight, out, log_sum_exp = held.q, held.kv, held.diagonal, held.sight, held.out, held.log_sum_exp
    rows, heads, width = q.shape
    groups, scale = kv.shape[2], 1.0 / math.sqrt(width)
    sizes = (rows, kv.shape[0], diagonal.shape[1], sight.step, sight.window, scale)
    shape = {"HEADS": heads, "GROUPS": groups, "WIDTH": width}
    delta = torch.empty_like(log_sum_exp)
    launch = _launch(_QUERIES, q)
    spans = sight.key_spans(launch["BLOCK_Q"])
    _query_gradient_kernel[(heads, spans.shape[1])](
        upstream, q, kv, diagonal, sight.rows, sight.positions, sight.key_positions, spans, out, log_sum_exp, delta,
        *sizes, **shape, **launch,
    )  # fmt: skip
    launch = _launch(_KEYS, q)
    spans = sight.query_spans(launch["BLOCK_K"])
    _key_gradient_kernel[(spans.shape[1], groups)](
        upstream, q, kv, sight.positions, sight.key_positions, spans, log_sum_exp, delta, kv_gradient, *sizes,
        **shape, **launch,
    )  # fmt: skip
    if sight.step:
        diagonal_key_gradients(upstream, held, delta, diagonal_gradient)
    return out


def _launch(tiles: dict[str, int], q: Tensor) -> dict[str, Any]:
    """Float32 operands take twice the shared memory; products of them must be exact in the tests that use them."""
    if q.dtype == torch.float32:
        return {"BLOCK_Q": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1, "PRECISION": "ieee"}
    return {**tiles, "PRECISION": "tf32"}


@jit
def _loops(spans, tile, tiles, BLOCK: tl.constexpr):
    """Edges of three loops in steps of BLOCK: masked, whole, masked."""
    first = tl.load(spans + tile)
    whole_first = tl.load(spans + tiles + tile)
    whole_last = tl.load(spans + 2 * tiles + tile)
    last = tl.load(spans + 3 * tiles + tile)
    middle = first + tl.cdiv(tl.maximum(whole_first - first, 0), BLOCK) * BLOCK
    rest = middle + (tl.maximum(whole_last - middle, 0) // BLOCK) * BLOCK
    return first, middle, rest, last


@jit
def _forward_part(
    acc, largest, total, q_tile, kv, position, key_positions, group, low, high, keys, reach, scale_2,
    MASKED: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    for start in range(low, high, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        place = kv + tl.minimum(key, keys - 1).to(tl.int64)[:, None] * (2 * GROUPS * WIDTH) + group * WIDTH + column
        scores = tl.dot(q_tile, tl.trans(tl.load(place)), input_precision=PRECISION)
        if MASKED:
            at = tl.load(key_positions + key, mask=key < high, other=2147483647)[None, :]
            seen = (at <= position[:, None]) & (position[:, None] - at < reach)
            scores = tl.where(seen, scores, float("-inf"))
        above = tl.maximum(largest, tl.max(scores, 1) * scale_2)
        raised = tl.exp2(scores * scale_2 - above[:, None])
        shrink = tl.exp2(largest - above)
        total = total * shrink + tl.sum(raised, 1)
        acc = acc * shrink[:, None]
        values = tl.load(place + GROUPS * WIDTH)
        acc = tl.dot(raised.to(values.dtype), values, acc, input_precision=PRECISION)
        largest = above
    return acc, largest, total


@jit(varying=_SIZES)
def _attend_kernel(
    q, kv, diagonal, rows, positions, key_positions, spans, out, log_sum_exp, queries, keys, slots, step, window, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head, tile = tl.program_id(0), tl.program_id(1)
    group = head // (HEADS // GROUPS)
    column = tl.arange(0, WIDTH)[None, :]
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = row < queries
    near = tl.minimum(row, queries - 1)
    q_tile = tl.load(q + near.to(tl.int64)[:, None] * (HEADS * WIDTH) + head * WIDTH + column)
    position = tl.load(positions + near)
    scale_2 = scale * 1.4426950408889634
    # Finite, so that a first block without a visible key leaves zeros instead of NaN.
    largest = tl.full((BLOCK_Q,), -1.0e30, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    acc = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
    slot = tl.load(rows + near)
    acc, largest, total = diagonal_part(
        acc, largest, total, q_tile, diagonal, slot, slots, group, step, scale_2, GROUPS, WIDTH
    )  # fmt: skip
    first, middle, rest, last = _loops(spans, tile, tl.num_programs(1), BLOCK_K)
    reach = window - step
    acc, largest, total = _forward_part(
        acc, largest, total, q_tile, kv, position, key_positions, group, first, tl.minimum(middle, last), keys, reach,
        scale_2, True, GROUPS, WIDTH, BLOCK_K, PRECISION,
    )  # fmt: skip
    acc, largest, total = _forward_part(
        acc, largest, total, q_tile, kv, position, key_positions, group, middle, rest, keys, reach,
        scale_2, False, GROUPS, WIDTH, BLOCK_K, PRECISION,
    )  # fmt: skip
    acc, largest, total = _forward_part(
        acc, largest, total, q_tile, kv, position, key_positions, group, rest, last, keys, reach,
        scale_2, True, GROUPS, WIDTH, BLOCK_K, PRECISION,
    )  # fmt: skip
    place = out + row.to(tl.int64)[:, None] * (HEADS * WIDTH) + head * WIDTH + column
    tl.store(place, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(log_sum_exp + head * queries + row, (largest + tl.log2(total)) * 0.6931471805599453, mask=inside)


@jit
def _query_gradient_part(
    acc, q_tile, up_tile, kv, log_2, delta, position, key_positions, group, low, high, keys, reach, scale_2,
    MASKED: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    for start in range(low, high, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        place = kv + tl.minimum(key, keys - 1).to(tl.int64)[:, None] * (2 * GROUPS * WIDTH) + group * WIDTH + column
        k_tile = tl.load(place)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_2 - log_2[:, None]
        if MASKED:
            at = tl.load(key_positions + key, mask=key < high, other=2147483647)[None, :]
            seen = (at <= position[:, None]) & (position[:, None] - at < reach)
            scores = tl.where(seen, scores, float("-inf"))
        p = tl.exp2(scores)
        p_gradient = tl.dot(up_tile, tl.trans(tl.load(place + GROUPS * WIDTH)), input_precision=PRECISION)
        gradient = p * (p_gradient - delta[:, None])
        acc = tl.dot(gradient.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    return acc


@jit(varying=_SIZES)
def _query_gradient_kernel(
    upstream, q, kv, diagonal, rows, positions, key_positions, spans, out, log_sum_exp, deltas, queries, keys,
    slots, step, window, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    head, tile = tl.program_id(0), tl.program_id(1)
    group = head // (HEADS // GROUPS)
    column = tl.arange(0, WIDTH)[None, :]
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    inside = row < queries
    near = tl.minimum(row, queries - 1)
    place = near.to(tl.int64)[:, None] * (HEADS * WIDTH) + head * WIDTH + column
    q_tile = tl.load(q + place)
    up_tile = tl.load(upstream + place)
    delta = tl.sum(up_tile.to(tl.float32) * tl.load(out + place).to(tl.float32), 1)
    tl.store(deltas + head * queries + row, delta, mask=inside)
    log_2 = tl.load(log_sum_exp + head * queries + near) * 1.4426950408889634
    position = tl.load(positions + near)
    scale_2 = scale * 1.4426950408889634
    acc = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
    slot = tl.load(rows + near)
    acc = diagonal_query_part(
        acc, q_tile, up_tile, diagonal, slot, slots, group, step, log_2, delta, scale_2, GROUPS, WIDTH
    )
    first, middle, rest, last = _loops(spans, tile, tl.num_programs(1), BLOCK_K)
    reach = window - step
    acc = _query_gradient_part(
        acc, q_tile, up_tile, kv, log_2, delta, position, key_positions, group, first, tl.minimum(middle, last), keys,
        reach, scale_2, True, GROUPS, WIDTH, BLOCK_K, PRECISION,
    )  # fmt: skip
    acc = _query_gradient_part(
        acc, q_tile, up_tile, kv, log_2, delta, position, key_positions, group, middle, rest, keys,
        reach, scale_2, False, GROUPS, WIDTH, BLOCK_K, PRECISION,
    )  # fmt: skip
    acc = _query_gradient_part(
        acc, q_tile, up_tile, kv, log_2, delta, position, key_positions, group, rest, last, keys,
        reach, scale_2, True, GROUPS, WIDTH, BLOCK_K, PRECISION,
    )  # fmt: skip
    # In the output's place: no other program reads these rows of this head, nor does what comes after.
    tl.store(out + place, (acc * scale).to(out.dtype.element_ty), mask=inside[:, None])


@jit
def _key_gradient_part(
    k_acc, v_acc, k_tile, v_tile, upstream, q, log_sum_exp, deltas, at, positions, group, low, high, queries, reach,
    scale_2, MASKED: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All heads of the group in one loop, so that loads of the next head overlap with products of this one."""
    column = tl.arange(0, WIDTH)[None, :]
    blocks = tl.cdiv(tl.maximum(high - low, 0), BLOCK_Q)
    for number in range(blocks * (HEADS // GROUPS)):
        head = group * (HEADS // GROUPS) + number // blocks
        row = low + (number % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        near = tl.minimum(row, queries - 1)
        place = near.to(tl.int64)[:, None] * (HEADS * WIDTH) + head * WIDTH + column
        q_tile = tl.load(q + place)
        log_2 = tl.load(log_sum_exp + head * queries + near) * 1.4426950408889634
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale_2 - log_2[None, :]
        if MASKED:
            position = tl.load(positions + near)
            seen = (at[:, None] <= position[None, :]) & (position[None, :] - at[:, None] < reach)
            scores = tl.where(seen & (row < high)[None, :], scores, float("-inf"))
        p = tl.exp2(scores)
        up_tile = tl.load(upstream + place)
        v_acc = tl.dot(p.to(up_tile.dtype), up_tile, v_acc, input_precision=PRECISION)
        p_gradient = tl.dot(v_tile, tl.trans(up_tile), input_precision=PRECISION)
        gradient = p * (p_gradient - tl.load(deltas + head * queries + near)[None, :])
        k_acc = tl.dot(gradient.to(q_tile.dtype), q_tile, k_acc, input_precision=PRECISION)
    return k_acc, v_acc


@jit(varying=_SIZES)
def _key_gradient_kernel(
    upstream, q, kv, positions, key_positions, spans, log_sum_exp, deltas, kv_gradient,
    queries, keys, slots, step, window, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    tile, group = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, WIDTH)[None, :]
    key = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = key < keys
    near = tl.minimum(key, keys - 1)
    place = near.to(tl.int64)[:, None] * (2 * GROUPS * WIDTH) + group * WIDTH + column
    k_tile = tl.load(kv + place)
    v_tile = tl.load(kv + place + GROUPS * WIDTH)
    at = tl.load(key_positions + near)
    scale_2 = scale * 1.4426950408889634
    k_acc = tl.zeros((BLOCK_K, WIDTH), tl.float32)
    v_acc = tl.zeros((BLOCK_K, WIDTH), tl.float32)
    first, middle, rest, last = _loops(spans, tile, tl.num_programs(0), BLOCK_Q)
    reach = window - step
    k_acc, v_acc = _key_gradient_part(
        k_acc, v_acc, k_tile, v_tile, upstream, q, log_sum_exp, deltas, at, positions, group, first,
        tl.minimum(middle, last), queries, reach, scale_2, True, HEADS, GROUPS, WIDTH, BLOCK_Q, PRECISION,
    )  # fmt: skip
    k_acc, v_acc = _key_gradient_part(
        k_acc, v_acc, k_tile, v_tile, upstream, q, log_sum_exp, deltas, at, positions, group, middle,
        rest, queries, reach, scale_2, False, HEADS, GROUPS, WIDTH, BLOCK_Q, PRECISION,
    )  # fmt: skip
    k_acc, v_acc = _key_gradient_part(
        k_acc, v_acc, k_tile, v_tile, upstream, q, log_sum_exp, deltas, at, positions, group, rest,
        last, queries, reach, scale_2, True, HEADS, GROUPS, WIDTH, BLOCK_Q, PRECISION,
    )  # fmt: skip
    held = inside[:, None]
    k_place = kv_gradient + place
    v_place = k_place + GROUPS * WIDTH
    tl.store(k_place, tl.load(k_place, mask=held, other=0.0) + k_acc * scale, mask=held)
    tl.store(v_place, tl.load(v_place, mask=held, other=0.0) + v_acc, mask=held)
