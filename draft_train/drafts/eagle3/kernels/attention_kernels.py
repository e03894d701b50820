"""The Triton kernels of `attention`, with their launches.

A program takes a tile of queries (or of keys) and runs through the other side in three loops: masked blocks at the
front, whole blocks in the middle, masked blocks at the back. Softmax is computed with powers of two.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from draftcache.draft_train.drafts.eagle3.kernels.attention_result import AttentionResult
from draftcache.draft_train.drafts.eagle3.kernels.diagonal_keys import (
    diagonal_key_gradients,
    diagonal_part,
    diagonal_query_part,
)
from draftcache.draft_train.drafts.eagle3.kernels.step_mask import StepMask
from draftcache.store.common.triton_launch import jit, tl

_SIZES = ("queries", "keys", "slots", "step", "window")
"""Arguments of the kernels that change from step to step: no variant is compiled for their values."""

_FORWARD = {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}
_QUERIES = {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
_KEYS = {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}


def forward(q: Tensor, kv: Tensor, diagonal: Tensor, mask: StepMask) -> tuple[Tensor, Tensor]:
    """Return output [T, N, D] and log-sum-exp [N, T] float32 for the arguments of `attention.attend`."""
    rows, heads, width = q.shape
    out = torch.empty_like(q)
    log_sum_exp = torch.empty(heads, rows, device=q.device, dtype=torch.float32)
    launch = _launch(_FORWARD, q)
    spans = mask.key_spans(launch["BLOCK_Q"])
    _attend_kernel[(heads, spans.shape[1])](
        q, kv, diagonal, mask.rows, mask.positions, mask.key_positions, spans, out, log_sum_exp, rows, kv.shape[0],
        diagonal.shape[1], mask.step, mask.window, 1.0 / math.sqrt(width),
        HEADS=heads, GROUPS=kv.shape[2], WIDTH=width, **launch,
    )  # fmt: skip
    return out, log_sum_exp


def backward(upstream: Tensor, result: AttentionResult, kv_gradient: Tensor, diagonal_gradient: Tensor) -> Tensor:
    """Compute what `attention.attend_backward` does. The result takes the memory of `result.out`."""
    q, kv, diagonal, mask = result.q, result.kv, result.diagonal, result.mask
    out, log_sum_exp = result.out, result.log_sum_exp
    rows, heads, width = q.shape
    groups, scale = kv.shape[2], 1.0 / math.sqrt(width)
    sizes = (rows, kv.shape[0], diagonal.shape[1], mask.step, mask.window, scale)
    shape = {"HEADS": heads, "GROUPS": groups, "WIDTH": width}
    delta = torch.empty_like(log_sum_exp)
    launch = _launch(_QUERIES, q)
    spans = mask.key_spans(launch["BLOCK_Q"])
    _query_gradient_kernel[(heads, spans.shape[1])](
        upstream, q, kv, diagonal, mask.rows, mask.positions, mask.key_positions, spans, out, log_sum_exp, delta,
        *sizes, **shape, **launch,
    )  # fmt: skip
    launch = _launch(_KEYS, q)
    spans = mask.query_spans(launch["BLOCK_K"])
    _key_gradient_kernel[(spans.shape[1], groups)](
        upstream, q, kv, mask.positions, mask.key_positions, spans, log_sum_exp, delta, kv_gradient, *sizes,
        **shape, **launch,
    )  # fmt: skip
    if mask.step:
        diagonal_key_gradients(upstream, result, delta, diagonal_gradient)
    return out


def _launch(tiles: dict[str, int], q: Tensor) -> dict[str, Any]:
    """Return a kernel's launch parameters.

    Float32 operands get smaller tiles, because they take twice the shared memory, and exact products, because the tests
    that use them need these.
    """
    if q.dtype == torch.float32:
        return {"BLOCK_Q": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1, "PRECISION": "ieee"}
    return {**tiles, "PRECISION": "tf32"}


@jit
def _loops(spans, tile, tiles, BLOCK: tl.constexpr):
    """Return the edges of three loops in steps of BLOCK from a tile's spans: masked blocks, whole ones, masked ones."""
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
        pointer = kv + tl.minimum(key, keys - 1).to(tl.int64)[:, None] * (2 * GROUPS * WIDTH) + group * WIDTH + column
        scores = tl.dot(q_tile, tl.trans(tl.load(pointer)), input_precision=PRECISION)
        if MASKED:
            at = tl.load(key_positions + key, mask=key < high, other=2147483647)[None, :]
            seen = (at <= position[:, None]) & (position[:, None] - at < reach)
            scores = tl.where(seen, scores, float("-inf"))
        above = tl.maximum(largest, tl.max(scores, 1) * scale_2)
        raised = tl.exp2(scores * scale_2 - above[:, None])
        shrink = tl.exp2(largest - above)
        total = total * shrink + tl.sum(raised, 1)
        acc = acc * shrink[:, None]
        values = tl.load(pointer + GROUPS * WIDTH)
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
    pointer = out + row.to(tl.int64)[:, None] * (HEADS * WIDTH) + head * WIDTH + column
    tl.store(pointer, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(log_sum_exp + head * queries + row, (largest + tl.log2(total)) * 0.6931471805599453, mask=inside)


@jit
def _query_gradient_part(
    acc, q_tile, up_tile, kv, log_2, delta, position, key_positions, group, low, high, keys, reach, scale_2,
    MASKED: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)
    for start in range(low, high, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        pointer = kv + tl.minimum(key, keys - 1).to(tl.int64)[:, None] * (2 * GROUPS * WIDTH) + group * WIDTH + column
        k_tile = tl.load(pointer)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_2 - log_2[:, None]
        if MASKED:
            at = tl.load(key_positions + key, mask=key < high, other=2147483647)[None, :]
            seen = (at <= position[:, None]) & (position[:, None] - at < reach)
            scores = tl.where(seen, scores, float("-inf"))
        p = tl.exp2(scores)
        p_gradient = tl.dot(up_tile, tl.trans(tl.load(pointer + GROUPS * WIDTH)), input_precision=PRECISION)
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
    offset = near.to(tl.int64)[:, None] * (HEADS * WIDTH) + head * WIDTH + column
    q_tile = tl.load(q + offset)
    up_tile = tl.load(upstream + offset)
    delta = tl.sum(up_tile.to(tl.float32) * tl.load(out + offset).to(tl.float32), 1)
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
    # The gradient overwrites the output: no other program and no later kernel reads these rows of this head.
    tl.store(out + offset, (acc * scale).to(out.dtype.element_ty), mask=inside[:, None])


@jit
def _key_gradient_part(
    k_acc, v_acc, k_tile, v_tile, upstream, q, log_sum_exp, deltas, at, positions, group, low, high, queries, reach,
    scale_2, MASKED: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Go through all heads of the group in one loop, so that loads for the next head overlap with products."""
    column = tl.arange(0, WIDTH)[None, :]
    blocks = tl.cdiv(tl.maximum(high - low, 0), BLOCK_Q)
    for number in range(blocks * (HEADS // GROUPS)):
        head = group * (HEADS // GROUPS) + number // blocks
        row = low + (number % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        near = tl.minimum(row, queries - 1)
        offset = near.to(tl.int64)[:, None] * (HEADS * WIDTH) + head * WIDTH + column
        q_tile = tl.load(q + offset)
        log_2 = tl.load(log_sum_exp + head * queries + near) * 1.4426950408889634
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale_2 - log_2[None, :]
        if MASKED:
            position = tl.load(positions + near)
            seen = (at[:, None] <= position[None, :]) & (position[None, :] - at[:, None] < reach)
            scores = tl.where(seen & (row < high)[None, :], scores, float("-inf"))
        p = tl.exp2(scores)
        up_tile = tl.load(upstream + offset)
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
    offset = near.to(tl.int64)[:, None] * (2 * GROUPS * WIDTH) + group * WIDTH + column
    k_tile = tl.load(kv + offset)
    v_tile = tl.load(kv + offset + GROUPS * WIDTH)
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
    k_pointer = kv_gradient + offset
    v_pointer = k_pointer + GROUPS * WIDTH
    tl.store(k_pointer, tl.load(k_pointer, mask=held, other=0.0) + k_acc * scale, mask=held)
    tl.store(v_pointer, tl.load(v_pointer, mask=held, other=0.0) + v_acc, mask=held)
