"""The Triton kernels of `attention` that own tiles of queries: the output, and the queries' gradient.

A program takes the queries of one key-value head as rows (block, slot, head of the group) and runs through the context
rows that its blocks see in three loops: masked ones at the front, whole ones in the middle, masked ones at the back.
Then come the slots of its blocks. Softmax is computed with powers of two.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from draftcache.draft_train.drafts.block.kernels.attention_result import BlockAttentionResult
from draftcache.draft_train.drafts.block.kernels.block_mask import BlockMask
from draftcache.draft_train.drafts.block.kernels.tiles import (
    MASKED,
    OWN,
    SIZES,
    WHOLE,
    Tiles,
    is_seen,
    kernel_shape,
    launch_parameters,
    loop_edges,
    own_tile,
    query_rows,
)
from draftcache.store.common.triton_launch import jit, tl

_FORWARD = Tiles(queries=128, keys=64, warps=4, stages=2)
_GRADIENT = Tiles(queries=128, keys=64, warps=8, stages=3)
"""Those of eagle3/kernels/attention_kernels, whose loops hold the same products: on sm_90 a loop over whole tiles is as
long as theirs within 1 % (626 instructions and 318), and spills three registers at most."""
_WIDE = Tiles(queries=128, keys=32, warps=8, stages=2)
"""For D = 256, where the gradient's operands take 192 KiB of 227, and the accumulator half of the registers."""


def forward(
    q: Tensor, context_kv: Tensor, block_kv: Tensor, mask: BlockMask, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return output [S, B, N, D] and log-sum-exp [S, B, N] float32 for the arguments of `attention.attend_blocks`."""
    blocks, slots, heads, width = q.shape
    out = torch.empty_like(q)
    log_sum_exp = torch.empty(blocks, slots, heads, device=q.device, dtype=torch.float32)
    if not blocks:
        return out, log_sum_exp
    groups = context_kv.shape[2]
    launch = launch_parameters(q, _FORWARD, _WIDE)
    low, high = mask.context_range(slots)
    tiles = -(-blocks * slots * (heads // groups) // launch["BLOCK_Q"])
    _attend_kernel[(tiles, groups)](
        q, context_kv, block_kv, q if sinks is None else sinks, low, high, out, log_sum_exp, blocks * slots,
        context_kv.shape[0], min(mask.window, slots), 1.0 / math.sqrt(width), SINKS=sinks is not None,
        BLOCK_O=own_tile(heads // groups, launch["BLOCK_K"]), **kernel_shape(q, groups, mask), **launch,
    )  # fmt: skip
    return out, log_sum_exp


def query_gradient(upstream: Tensor, result: BlockAttentionResult) -> tuple[Tensor, Tensor]:
    """Return the gradient [S, B, N, D] of the queries, and their sums [S, B, N] float32 of upstream times output."""
    q, mask = result.q, result.mask
    blocks, slots, heads, width = q.shape
    out, delta = torch.empty_like(q), torch.empty_like(result.log_sum_exp)
    if not blocks:
        return out, delta
    groups = result.context_kv.shape[2]
    launch = launch_parameters(q, _GRADIENT, _WIDE)
    low, high = mask.context_range(slots)
    tiles = -(-blocks * slots * (heads // groups) // launch["BLOCK_Q"])
    _query_gradient_kernel[(tiles, groups)](
        upstream, q, result.context_kv, result.block_kv, low, high, result.out, result.log_sum_exp, delta, out,
        blocks * slots, result.context_kv.shape[0], min(mask.window, slots), 1.0 / math.sqrt(width),
        BLOCK_O=own_tile(heads // groups, launch["BLOCK_K"]), **kernel_shape(q, groups, mask), **launch,
    )  # fmt: skip
    return out, delta


@jit
def _forward_part(
    acc, largest, total, q_tile, kv, row_low, row_high, token, first, last, keys, window, scale_2,
    KIND: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)[None, :]
    for start in range(first, last, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        pointer = kv + tl.minimum(key, keys - 1).to(tl.int64)[:, None] * (2 * GROUPS * WIDTH) + column
        scores = tl.dot(q_tile, tl.trans(tl.load(pointer)), input_precision=PRECISION)
        if KIND != WHOLE:
            seen = is_seen(
                key[None, :], token[:, None], row_low[:, None], row_high[:, None], window, KIND, SLOTS, CAUSAL
            )
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


@jit(varying=SIZES)
def _attend_kernel(
    q, context_kv, block_kv, sinks, low, high, out, log_sum_exp, tokens, keys, window, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, CAUSAL: tl.constexpr,
    SINKS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, group = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, WIDTH)[None, :]
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    token, head, inside = query_rows(row, group, tokens, HEADS, GROUPS)
    pair = token.to(tl.int64) * HEADS + head
    q_tile = tl.load(q + pair[:, None] * WIDTH + column)
    row_low = tl.load(low + token)
    row_high = tl.load(high + token // SLOTS)
    scale_2 = scale * 1.4426950408889634
    # Finite, so that a first tile of keys without a visible one leaves zeros instead of NaN.
    largest = tl.full((BLOCK_Q,), -1.0e30, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    if SINKS:
        largest = tl.maximum(largest, tl.load(sinks + head).to(tl.float32) * 1.4426950408889634)
        total += 1.0
    acc = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
    first_block, last_block, first, middle, rest, last = loop_edges(
        low, high, tile, tokens, HEADS // GROUPS, SLOTS, BLOCK_Q, BLOCK_K
    )
    context = context_kv + group * WIDTH
    acc, largest, total = _forward_part(
        acc, largest, total, q_tile, context, row_low, row_high, token, first, tl.minimum(middle, last), keys, window,
        scale_2, MASKED, GROUPS, WIDTH, SLOTS, CAUSAL, BLOCK_K, PRECISION,
    )  # fmt: skip
    acc, largest, total = _forward_part(
        acc, largest, total, q_tile, context, row_low, row_high, token, middle, rest, keys, window,
        scale_2, WHOLE, GROUPS, WIDTH, SLOTS, CAUSAL, BLOCK_K, PRECISION,
    )  # fmt: skip
    acc, largest, total = _forward_part(
        acc, largest, total, q_tile, context, row_low, row_high, token, rest, last, keys, window,
        scale_2, MASKED, GROUPS, WIDTH, SLOTS, CAUSAL, BLOCK_K, PRECISION,
    )  # fmt: skip
    acc, largest, total = _forward_part(
        acc, largest, total, q_tile, block_kv + group * WIDTH, row_low, row_high, token, first_block * SLOTS,
        (last_block + 1) * SLOTS, tokens, window, scale_2, OWN, GROUPS, WIDTH, SLOTS, CAUSAL, BLOCK_O, PRECISION,
    )  # fmt: skip
    pointer = out + pair[:, None] * WIDTH + column
    tl.store(pointer, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(log_sum_exp + pair, (largest + tl.log2(total)) * 0.6931471805599453, mask=inside)


@jit
def _query_gradient_part(
    acc, q_tile, up_tile, kv, log_2, delta, row_low, row_high, token, first, last, keys, window, scale_2,
    KIND: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, WIDTH)[None, :]
    for start in range(first, last, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        pointer = kv + tl.minimum(key, keys - 1).to(tl.int64)[:, None] * (2 * GROUPS * WIDTH) + column
        k_tile = tl.load(pointer)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale_2 - log_2[:, None]
        if KIND != WHOLE:
            seen = is_seen(
                key[None, :], token[:, None], row_low[:, None], row_high[:, None], window, KIND, SLOTS, CAUSAL
            )
            scores = tl.where(seen, scores, float("-inf"))
        p = tl.exp2(scores)
        p_gradient = tl.dot(up_tile, tl.trans(tl.load(pointer + GROUPS * WIDTH)), input_precision=PRECISION)
        gradient = p * (p_gradient - delta[:, None])
        acc = tl.dot(gradient.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)
    return acc


@jit(varying=SIZES)
def _query_gradient_kernel(
    upstream, q, context_kv, block_kv, low, high, out, log_sum_exp, deltas, q_gradient, tokens, keys, window, scale,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr, SLOTS: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_O: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, group = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, WIDTH)[None, :]
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    token, head, inside = query_rows(row, group, tokens, HEADS, GROUPS)
    pair = token.to(tl.int64) * HEADS + head
    offset = pair[:, None] * WIDTH + column
    q_tile = tl.load(q + offset)
    up_tile = tl.load(upstream + offset)
    delta = tl.sum(up_tile.to(tl.float32) * tl.load(out + offset).to(tl.float32), 1)
    tl.store(deltas + pair, delta, mask=inside)
    log_2 = tl.load(log_sum_exp + pair) * 1.4426950408889634
    row_low = tl.load(low + token)
    row_high = tl.load(high + token // SLOTS)
    scale_2 = scale * 1.4426950408889634
    acc = tl.zeros((BLOCK_Q, WIDTH), tl.float32)
    first_block, last_block, first, middle, rest, last = loop_edges(
        low, high, tile, tokens, HEADS // GROUPS, SLOTS, BLOCK_Q, BLOCK_K
    )
    context = context_kv + group * WIDTH
    acc = _query_gradient_part(
        acc, q_tile, up_tile, context, log_2, delta, row_low, row_high, token, first, tl.minimum(middle, last), keys,
        window, scale_2, MASKED, GROUPS, WIDTH, SLOTS, CAUSAL, BLOCK_K, PRECISION,
    )  # fmt: skip
    acc = _query_gradient_part(
        acc, q_tile, up_tile, context, log_2, delta, row_low, row_high, token, middle, rest, keys,
        window, scale_2, WHOLE, GROUPS, WIDTH, SLOTS, CAUSAL, BLOCK_K, PRECISION,
    )  # fmt: skip
    acc = _query_gradient_part(
        acc, q_tile, up_tile, context, log_2, delta, row_low, row_high, token, rest, last, keys,
        window, scale_2, MASKED, GROUPS, WIDTH, SLOTS, CAUSAL, BLOCK_K, PRECISION,
    )  # fmt: skip
    acc = _query_gradient_part(
        acc, q_tile, up_tile, block_kv + group * WIDTH, log_2, delta, row_low, row_high, token, first_block * SLOTS,
        (last_block + 1) * SLOTS, tokens, window, scale_2, OWN, GROUPS, WIDTH, SLOTS, CAUSAL, BLOCK_O, PRECISION,
    )  # fmt: skip
    tl.store(q_gradient + offset, (acc * scale).to(q_gradient.dtype.element_ty), mask=inside[:, None])
