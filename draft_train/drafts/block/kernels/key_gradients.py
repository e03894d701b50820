"""The Triton kernels of `attention` that own tiles of keys: the gradients of the context's and of the slots' own.

A program takes a tile of keys of one key-value head and runs through the queries of all blocks that see it, as rows
(block, slot, head of the group). Long runs are cut into parts, which a second kernel adds up in order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from draftcache.draft_train.drafts.block.kernels.attention_result import BlockAttentionResult
from draftcache.draft_train.drafts.block.kernels.block_mask import block_spans
from draftcache.draft_train.drafts.block.kernels.tiles import (
    MASKED,
    OWN,
    OWN_TILE,
    SIZES,
    WHOLE,
    Tiles,
    is_seen,
    kernel_shape,
    launch_parameters,
    query_rows,
    whole_edges,
)
from draftcache.store.common.triton_launch import jit, tl

_CONTEXT = Tiles(queries=64, keys=64, warps=4, stages=2)
"""That of eagle3/kernels/attention_kernels, whose loop holds the same products: on sm_90 a loop over whole tiles has
459 instructions (theirs 489) and spills nothing. Two programs of 97 KiB of shared memory fit a processor."""
_WIDE_CONTEXT = Tiles(queries=32, keys=64, warps=8, stages=2)
"""For D = 256, where both accumulators take half of the registers of 8 warps."""
_SLOTS = Tiles(queries=64, keys=OWN_TILE, warps=4, stages=2)
_WIDE_SLOTS = Tiles(queries=32, keys=OWN_TILE, warps=4, stages=2)
"""Few keys, because the queries of another block in the tile see none of a block's."""

_PROGRAMS = 1056
"""Programs of a pass over context that keep a GPU busy: two on each of 132 processors, four times over."""
_LEAST_TILES = 8
"""Tiles of queries in a part, at least."""
PART_BYTES = 1 << 29
"""Most memory of the parts."""


def add_context_gradient(
    upstream: Tensor, result: BlockAttentionResult, delta: Tensor, context_gradient: Tensor
) -> None:
    """Add the gradient of `result.context_kv` to `context_gradient` [R, 2, G, D] float32.

    `delta` [S, B, N] holds each query's sum of `upstream` times output.
    """
    q, mask = result.q, result.mask
    blocks, slots, _, width = q.shape
    rows, _, groups, _ = context_gradient.shape
    if not blocks:
        return
    launch = launch_parameters(q, _CONTEXT, _WIDE_CONTEXT)
    low, high = mask.context_range(slots)
    spans = block_spans(low, high, rows, launch["BLOCK_K"])
    parts = _part_count(result, launch["BLOCK_Q"], launch["BLOCK_K"])
    target = context_gradient if parts == 1 else context_gradient.new_empty(parts, *context_gradient.shape)
    _key_gradient_kernel[(spans.shape[1], groups, parts)](
        upstream, q, result.context_kv, low, high, spans, result.log_sum_exp, delta, target, blocks * slots, rows,
        min(mask.window, slots), 1.0 / math.sqrt(width), OWN_KEYS=False, PARTS=parts, **kernel_shape(q, groups, mask),
        **launch,
    )  # fmt: skip
    if parts > 1:
        _add_parts_kernel[(spans.shape[1], 2 * groups)](
            target, spans, context_gradient, rows, GROUPS=groups, WIDTH=width, PARTS=parts, BLOCK_K=launch["BLOCK_K"],
            num_warps=4,
        )  # fmt: skip


def block_gradient(upstream: Tensor, result: BlockAttentionResult, delta: Tensor) -> Tensor:
    """Return the gradient [S, B, 2, G, D] of `result.block_kv`; `delta` is that of `add_context_gradient`."""
    q, mask = result.q, result.mask
    blocks, slots, _, width = q.shape
    groups = result.block_kv.shape[3]
    gradient = torch.empty_like(result.block_kv)
    if not blocks:
        return gradient
    launch = launch_parameters(q, _SLOTS, _WIDE_SLOTS)
    _key_gradient_kernel[(-(-blocks * slots // launch["BLOCK_K"]), groups, 1)](
        upstream, q, result.block_kv, delta, delta, delta, result.log_sum_exp, delta, gradient, blocks * slots,
        blocks * slots, min(mask.window, slots), 1.0 / math.sqrt(width), OWN_KEYS=True, PARTS=1,
        **kernel_shape(q, groups, mask), **launch,
    )  # fmt: skip
    return gradient


def _part_count(result: BlockAttentionResult, block_q: int, block_k: int) -> int:
    """Return into how many parts the queries of a tile of context are cut, from sizes that the host knows.

    S blocks behind neighbouring rows reach S + window context rows. A slice of them leaves too few tiles for a GPU: 96
    for 2,048 blocks, window 1,024 and G = 2.
    """
    blocks, slots, heads, _ = result.q.shape
    rows, _, groups, _ = result.context_kv.shape
    programs = groups * -(-min(rows, blocks + result.mask.window) // block_k)
    tiles = min(blocks, result.mask.window + block_k) * slots * (heads // groups) // block_q
    wanted = min(_PROGRAMS // programs, tiles // _LEAST_TILES, PART_BYTES // (4 * result.context_kv.numel()))
    return max(1, wanted)


@jit
def _key_gradient_part(
    k_acc, v_acc, k_tile, v_tile, upstream, q, low, high, log_sum_exp, deltas, key, group, first, last, tokens, window,
    scale_2, KIND: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr,
    CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)[None, :]
    turns: tl.constexpr = HEADS // GROUPS
    # Where tiles begin with the first head of a token, only one number changes from tile to tile.
    ahead = tl.arange(0, BLOCK_Q) // turns * HEADS + group * turns + tl.arange(0, BLOCK_Q) % turns
    for start in range(first, last, BLOCK_Q):
        row = start + tl.arange(0, BLOCK_Q)
        if KIND == WHOLE and BLOCK_Q % turns == 0:
            pair = start // turns * tl.cast(HEADS, tl.int64) + ahead
        else:
            token, head, _ = query_rows(row, group, tokens, HEADS, GROUPS)
            pair = token.to(tl.int64) * HEADS + head
        offset = pair[:, None] * WIDTH + column
        q_tile = tl.load(q + offset)
        log_2 = tl.load(log_sum_exp + pair) * 1.4426950408889634
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale_2 - log_2[None, :]
        if KIND != WHOLE:
            row_low = token
            row_high = token
            if KIND == MASKED:
                row_low = tl.load(low + token)
                row_high = tl.load(high + token // SLOTS)
            seen = is_seen(
                key[:, None], token[None, :], row_low[None, :], row_high[None, :], window, KIND, SLOTS, CAUSAL
            )
            scores = tl.where(seen & (row < last)[None, :], scores, float("-inf"))
        p = tl.exp2(scores)
        up_tile = tl.load(upstream + offset)
        v_acc = tl.dot(p.to(up_tile.dtype), up_tile, v_acc, input_precision=PRECISION)
        p_gradient = tl.dot(v_tile, tl.trans(up_tile), input_precision=PRECISION)
        gradient = p * (p_gradient - tl.load(deltas + pair)[None, :])
        k_acc = tl.dot(gradient.to(q_tile.dtype), q_tile, k_acc, input_precision=PRECISION)
    return k_acc, v_acc


@jit(varying=SIZES)
def _key_gradient_kernel(
    upstream, q, kv, low, high, spans, log_sum_exp, deltas, gradient, tokens, keys, window, scale,
    OWN_KEYS: tl.constexpr, PARTS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
    SLOTS: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of context rows, or of slots' own keys where OWN_KEYS says so; then keys are tokens."""
    tile, group, part, tiles = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.num_programs(0)
    rows_of_block: tl.constexpr = SLOTS * (HEADS // GROUPS)
    column = tl.arange(0, WIDTH)[None, :]
    key = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    if OWN_KEYS:
        first = tile * BLOCK_K // SLOTS * rows_of_block
        last = tl.minimum((tile * BLOCK_K + BLOCK_K - 1) // SLOTS + 1, tokens // SLOTS) * rows_of_block
    else:
        first = tl.load(spans + tile) * rows_of_block
        last = tl.load(spans + 3 * tiles + tile) * rows_of_block
    if first >= last:
        return
    offset = tl.minimum(key, keys - 1).to(tl.int64)[:, None] * (2 * GROUPS * WIDTH) + group * WIDTH + column
    k_tile = tl.load(kv + offset)
    v_tile = tl.load(kv + offset + GROUPS * WIDTH)
    scale_2 = scale * 1.4426950408889634
    k_acc = tl.zeros((BLOCK_K, WIDTH), tl.float32)
    v_acc = tl.zeros((BLOCK_K, WIDTH), tl.float32)
    if OWN_KEYS:
        k_acc, v_acc = _key_gradient_part(
            k_acc, v_acc, k_tile, v_tile, upstream, q, low, high, log_sum_exp, deltas, key, group, first, last, tokens,
            window, scale_2, OWN, HEADS, GROUPS, WIDTH, SLOTS, CAUSAL, BLOCK_Q, PRECISION,
        )  # fmt: skip
    else:
        whole_first = tl.load(spans + tiles + tile) * rows_of_block
        whole_last = tl.load(spans + 2 * tiles + tile) * rows_of_block
        size = tl.cdiv(last - first, PARTS * BLOCK_Q) * BLOCK_Q
        first += part * size
        last = tl.minimum(last, first + size)
        middle, rest = whole_edges(first, whole_first, tl.minimum(whole_last, last), BLOCK_Q)
        k_acc, v_acc = _key_gradient_part(
            k_acc, v_acc, k_tile, v_tile, upstream, q, low, high, log_sum_exp, deltas, key, group, first,
            tl.minimum(middle, last), tokens, window, scale_2, MASKED, HEADS, GROUPS, WIDTH, SLOTS, CAUSAL, BLOCK_Q,
            PRECISION,
        )  # fmt: skip
        k_acc, v_acc = _key_gradient_part(
            k_acc, v_acc, k_tile, v_tile, upstream, q, low, high, log_sum_exp, deltas, key, group, middle, rest, tokens,
            window, scale_2, WHOLE, HEADS, GROUPS, WIDTH, SLOTS, CAUSAL, BLOCK_Q, PRECISION,
        )  # fmt: skip
        k_acc, v_acc = _key_gradient_part(
            k_acc, v_acc, k_tile, v_tile, upstream, q, low, high, log_sum_exp, deltas, key, group, rest, last, tokens,
            window, scale_2, MASKED, HEADS, GROUPS, WIDTH, SLOTS, CAUSAL, BLOCK_Q, PRECISION,
        )  # fmt: skip
    held = (key < keys)[:, None]
    target = gradient + part.to(tl.int64) * keys * (2 * GROUPS * WIDTH) + offset
    if not OWN_KEYS and PARTS == 1:
        k_acc = tl.load(target, mask=held, other=0.0) + k_acc * scale
        v_acc = tl.load(target + GROUPS * WIDTH, mask=held, other=0.0) + v_acc
    else:
        k_acc = k_acc * scale
    tl.store(target, k_acc.to(gradient.dtype.element_ty), mask=held)
    tl.store(target + GROUPS * WIDTH, v_acc.to(gradient.dtype.element_ty), mask=held)


@jit(varying=SIZES[1:2])
def _add_parts_kernel(
    parts, spans, gradient, keys, GROUPS: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Add the parts of a tile of context rows, where it has any, to the gradient. All others were never written."""
    tile, column_group, tiles = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    if tl.load(spans + tile) >= tl.load(spans + 3 * tiles + tile):
        return
    key = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    held = (key < keys)[:, None]
    offset = key.to(tl.int64)[:, None] * (2 * GROUPS * WIDTH) + column_group * WIDTH + tl.arange(0, WIDTH)[None, :]
    total = tl.load(gradient + offset, mask=held, other=0.0)
    for part in range(PARTS):
        total += tl.load(parts + tl.cast(part, tl.int64) * keys * (2 * GROUPS * WIDTH) + offset, mask=held, other=0.0)
    tl.store(gradient + offset, total, mask=held)
