"""Heads with norms of their own (Qwen3's q_norm and k_norm): from projected rows to normed, rotated heads, and back.

A projected row holds queries, keys and values side by side, and there may be no queries. Each query head is normed with
one weight and each key head with another, both of the width of a head, and then rotated; values stay as they are.
Shape suffixes: T rows, N query heads, G key-value heads, D head width, P rows of the rotary table. C = (N + 2G) D.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from draftcache.draft_train.kernels.rotary import rotate
from draftcache.store.common.triton_launch import jit, power_of_two, runs_kernels, tl

_PROGRAMS = 528
"""Most programs of a backward pass. Each takes a share of the rows and sums the weights' gradients over them."""


@dataclass(frozen=True)
class HeadNorms:
    """The norms of a layer's heads, and how many heads a projected row holds."""

    query: Tensor
    """[D] weight of the query heads' norm."""
    key: Tensor
    """[D] weight of the key heads' norm."""
    eps: float
    queries: int
    """N, 0 where the projected rows hold keys and values only."""
    groups: int
    """G."""


def split_normed_heads(projected: Tensor, norms: HeadNorms, table: Tensor, table_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries [T, N, D], and keys and values [T, 2, G, D], of `projected` [T, C].

    `table` [2, P, D/2] is from `rotary_table`, and `table_rows` [T] int64 says which of its rows each row turns by. The
    computation is in float32 and rounds once.
    """
    if not runs_kernels(projected):
        return split_normed_heads_reference(projected, norms, table, table_rows)
    rows, width = projected.shape[0], norms.query.shape[0]
    q = projected.new_empty(rows, norms.queries, width)
    kv = projected.new_empty(rows, 2, norms.groups, width)
    if rows:
        _split_normed_kernel[(rows,)](
            projected, norms.query, norms.key, table, table_rows, q, kv, table.stride(0), norms.eps,
            QUERIES=norms.queries, GROUPS=norms.groups, HALF=width // 2, HALF_BLOCK=power_of_two(width // 2),
            HEADS=power_of_two(norms.queries + 2 * norms.groups), num_warps=4,
        )  # fmt: skip
    return q, kv


def split_normed_heads_reference(
    projected: Tensor, norms: HeadNorms, table: Tensor, table_rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Plain twin of `split_normed_heads`, which autograd can follow. It computes in float64 if its input is float64."""
    width = norms.query.shape[0]
    heads = projected.view(projected.shape[0], -1, width)
    wide = heads.to(torch.promote_types(heads.dtype, torch.float32))
    asked, keys = wide[:, : norms.queries], wide[:, norms.queries : norms.queries + norms.groups]
    turn = table[:, table_rows, None].to(wide.dtype)
    q, k = (
        rotate(F.rms_norm(part, (width,), weight.to(wide.dtype), norms.eps), turn).to(projected.dtype)
        for part, weight in ((asked, norms.query), (keys, norms.key))
    )
    return q.contiguous(), torch.stack((k, heads[:, norms.queries + norms.groups :]), dim=1)


def normed_heads_backward(
    q_gradient: Tensor,
    kv_gradient: Tensor,
    projected: Tensor,
    norms: HeadNorms,
    table: Tensor,
    table_rows: Tensor,
    query_gradient: Tensor,
    key_gradient: Tensor,
) -> Tensor:
    """Return the gradient [T, C] of `projected` for gradients [T, N, D] and [T, 2, G, D] of `split_normed_heads`.

    The gradients of the norms' weights are added to `query_gradient` and `key_gradient`, [D] float32 each.
    """
    if not runs_kernels(projected):
        return normed_heads_backward_reference(
            q_gradient, kv_gradient, projected, norms, table, table_rows, query_gradient, key_gradient
        )
    out, width = torch.empty_like(projected), norms.query.shape[0]
    rows = projected.shape[0]
    if not rows:
        return out
    programs = min(rows, _PROGRAMS)
    partial = torch.empty(programs, 2, width, device=projected.device, dtype=torch.float32)
    _normed_gradient_kernel[(programs,)](
        q_gradient, kv_gradient, projected, norms.query, norms.key, table, table_rows, out, partial, rows,
        table.stride(0), norms.eps, QUERIES=norms.queries, GROUPS=norms.groups, HALF=width // 2,
        HALF_BLOCK=power_of_two(width // 2), HEADS=power_of_two(norms.queries + 2 * norms.groups), num_warps=4,
    )  # fmt: skip
    sums = partial.sum(0)
    query_gradient += sums[0]
    key_gradient += sums[1]
    return out


def normed_heads_backward_reference(
    q_gradient: Tensor,
    kv_gradient: Tensor,
    projected: Tensor,
    norms: HeadNorms,
    table: Tensor,
    table_rows: Tensor,
    query_gradient: Tensor,
    key_gradient: Tensor,
) -> Tensor:
    """Plain twin of `normed_heads_backward`, by autograd over `split_normed_heads_reference`."""
    with torch.enable_grad():
        leaf, query, key = (value.detach().requires_grad_() for value in (projected, norms.query, norms.key))
        made = HeadNorms(query, key, norms.eps, norms.queries, norms.groups)
        q, kv = split_normed_heads_reference(leaf, made, table, table_rows)
        upstream = [q_gradient.to(q.dtype), kv_gradient.to(kv.dtype)]
        out, *found = torch.autograd.grad([q, kv], [leaf, query, key], upstream, materialize_grads=True)
    query_gradient += found[0]
    key_gradient += found[1]
    return out


@jit(varying=("table_stride",))
def _split_normed_kernel(
    projected, query_weight, key_weight, table, table_rows, q, kv, table_stride, eps, QUERIES: tl.constexpr,
    GROUPS: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, HALF_BLOCK)
    heads = tl.arange(0, HEADS)[:, None]
    table_row = tl.load(table_rows + row)
    inside = half < HALF
    cos = tl.load(table + table_row * HALF + half, mask=inside, other=1.0)[None, :]
    sin = tl.load(table + table_stride + table_row * HALF + half, mask=inside, other=0.0)[None, :]
    turns = heads < QUERIES + GROUPS
    cos = tl.where(turns, cos, 1.0)
    sin = tl.where(turns, sin, 0.0)
    held = inside[None, :] & (heads < QUERIES + 2 * GROUPS)
    pointer = projected + row * ((QUERIES + 2 * GROUPS) * 2 * HALF) + heads * (2 * HALF) + half[None, :]
    first = tl.load(pointer, mask=held, other=0.0).to(tl.float32)
    second = tl.load(pointer + HALF, mask=held, other=0.0).to(tl.float32)
    squares = (tl.sum(first * first, 1) + tl.sum(second * second, 1))[:, None]
    asks = heads < QUERIES
    factor_first, factor_second = _factors(query_weight, key_weight, asks, half, inside, HALF)
    scale = tl.where(turns, 1.0 / tl.sqrt(squares / (2 * HALF) + eps), 1.0)
    first = first * scale * tl.where(turns, factor_first, 1.0)
    second = second * scale * tl.where(turns, factor_second, 1.0)
    dtype = q.dtype.element_ty
    turned_first = (first * cos - second * sin).to(dtype)
    turned_second = (second * cos + first * sin).to(dtype)
    q_pointer = q + row * (QUERIES * 2 * HALF) + heads * (2 * HALF) + half[None, :]
    tl.store(q_pointer, turned_first, mask=held & asks)
    tl.store(q_pointer + HALF, turned_second, mask=held & asks)
    kv_pointer = kv + row * (2 * GROUPS * 2 * HALF) + (heads - QUERIES) * (2 * HALF) + half[None, :]
    answers = held & (heads >= QUERIES)
    tl.store(kv_pointer, turned_first, mask=answers)
    tl.store(kv_pointer + HALF, turned_second, mask=answers)


@jit
def _factors(query_weight, key_weight, asks, half, inside, HALF: tl.constexpr):
    """Return both halves of the weight of each head's norm; those of values are not used."""
    query_first = tl.load(query_weight + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    query_second = tl.load(query_weight + HALF + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    key_first = tl.load(key_weight + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    key_second = tl.load(key_weight + HALF + half, mask=inside, other=0.0).to(tl.float32)[None, :]
    return tl.where(asks, query_first, key_first), tl.where(asks, query_second, key_second)


@jit(varying=("rows", "table_stride"))
def _normed_gradient_kernel(
    q_gradient, kv_gradient, projected, query_weight, key_weight, table, table_rows, out, partial, rows, table_stride,
    eps, QUERIES: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    program, programs = tl.program_id(0), tl.num_programs(0)
    half = tl.arange(0, HALF_BLOCK)
    heads = tl.arange(0, HEADS)[:, None]
    inside = half < HALF
    asks = heads < QUERIES
    turns = heads < QUERIES + GROUPS
    held = inside[None, :] & (heads < QUERIES + 2 * GROUPS)
    answers = held & (heads >= QUERIES)
    is_key = turns & (heads >= QUERIES)
    factor_first, factor_second = _factors(query_weight, key_weight, asks, half, inside, HALF)
    query_first = tl.zeros((HALF_BLOCK,), tl.float32)
    query_second = tl.zeros((HALF_BLOCK,), tl.float32)
    key_first = tl.zeros((HALF_BLOCK,), tl.float32)
    key_second = tl.zeros((HALF_BLOCK,), tl.float32)
    for number in range(program, rows, programs):
        row = tl.cast(number, tl.int64)
        table_row = tl.load(table_rows + row)
        cos = tl.load(table + table_row * HALF + half, mask=inside, other=1.0)[None, :]
        sin = tl.load(table + table_stride + table_row * HALF + half, mask=inside, other=0.0)[None, :]
        cos = tl.where(turns, cos, 1.0)
        sin = tl.where(turns, sin, 0.0)
        q_pointer = q_gradient + row * (QUERIES * 2 * HALF) + heads * (2 * HALF) + half[None, :]
        kv_pointer = kv_gradient + row * (2 * GROUPS * 2 * HALF) + (heads - QUERIES) * (2 * HALF) + half[None, :]
        given_first = tl.load(kv_pointer, mask=answers, other=0.0).to(tl.float32)
        given_second = tl.load(kv_pointer + HALF, mask=answers, other=0.0).to(tl.float32)
        given_first += tl.load(q_pointer, mask=held & asks, other=0.0).to(tl.float32)
        given_second += tl.load(q_pointer + HALF, mask=held & asks, other=0.0).to(tl.float32)
        back_first = given_first * cos + given_second * sin
        back_second = given_second * cos - given_first * sin
        column = row * ((QUERIES + 2 * GROUPS) * 2 * HALF) + heads * (2 * HALF) + half[None, :]
        first = tl.load(projected + column, mask=held, other=0.0).to(tl.float32)
        second = tl.load(projected + column + HALF, mask=held, other=0.0).to(tl.float32)
        squares = (tl.sum(first * first, 1) + tl.sum(second * second, 1))[:, None]
        scale = 1.0 / tl.sqrt(squares / (2 * HALF) + eps)
        normed_first, normed_second = first * scale, second * scale
        query_first += tl.sum(tl.where(asks, back_first * normed_first, 0.0), 0)
        query_second += tl.sum(tl.where(asks, back_second * normed_second, 0.0), 0)
        key_first += tl.sum(tl.where(is_key, back_first * normed_first, 0.0), 0)
        key_second += tl.sum(tl.where(is_key, back_second * normed_second, 0.0), 0)
        weighted_first, weighted_second = back_first * factor_first, back_second * factor_second
        along = tl.sum(weighted_first * normed_first, 1) + tl.sum(weighted_second * normed_second, 1)
        mean = (along / (2 * HALF))[:, None]
        back_first = tl.where(turns, scale * (weighted_first - normed_first * mean), back_first)
        back_second = tl.where(turns, scale * (weighted_second - normed_second * mean), back_second)
        dtype = out.dtype.element_ty
        tl.store(out + column, back_first.to(dtype), mask=held)
        tl.store(out + column + HALF, back_second.to(dtype), mask=held)
    target = partial + program.to(tl.int64) * (4 * HALF) + half
    tl.store(target, query_first, mask=inside)
    tl.store(target + HALF, query_second, mask=inside)
    tl.store(target + 2 * HALF, key_first, mask=inside)
    tl.store(target + 3 * HALF, key_second, mask=inside)
