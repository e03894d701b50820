"""Rotary embeddings: from projected rows to rotated heads, and from the heads' gradients to the projections'.

Rotation is in the half form: (a, b) -> (a cos - b sin, b cos + a sin) for the halves a and b of a head.
Shape suffixes: T rows, N query heads, G key-value heads, D head width, P rows of the rotary table. A projected row
holds queries, keys and values side by side, and N or G may be 0. Key-value memory is [slots, 2, G, D], keys first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftcache.store.common.triton_launch import jit, power_of_two, runs_kernels, tl


def rotary_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Return cosines and sines [2, P, D/2] for int64 positions [P], in float32 at least, from angles in float64."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim)
    angles = torch.outer(positions.double(), frequencies)
    return torch.stack((angles.cos(), angles.sin())).to(torch.promote_types(dtype, torch.float32))


def rotate(heads: Tensor, table: Tensor) -> Tensor:
    """Return heads [..., D] rotated by a table that broadcasts to [2, ..., D/2], in the heads' dtype."""
    cos, sin = table
    first, second = heads.to(table.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads.dtype)


def split_heads(
    projected: Tensor,
    table: Tensor,
    table_rows: Tensor,
    queries: int,
    kv: Tensor,
    slots: Tensor,
    shared: Tensor | None = None,
) -> Tensor:
    """Return rotated queries [T, N, D] of `projected` [T, (N + 2G) D]; write rotated keys, and values, to `kv`.

    `table` [2, P, D/2] is from `rotary_table`, and `table_rows` [T] int64 says which of its rows belongs to each
    projected row. `queries` is N. Keys and values are written to the rows `slots` [T] int64 of `kv`; if `kv` has G = 0,
    the projections hold queries only. If `shared` [P, (N + 2G) D] is given, its rows `table_rows` are added to the
    projections first.
    """
    if not runs_kernels(projected):
        return split_heads_reference(projected, table, table_rows, queries, kv, slots, shared)
    rows, head_dim, groups = projected.shape[0], kv.shape[-1], kv.shape[-2]
    out = projected.new_empty(rows, queries, head_dim)
    if rows:
        added = projected if shared is None else shared
        _split_kernel[(rows,)](
            projected, added, table, table_rows, out, kv, slots, projected.stride(0), added.stride(0), table.stride(0),
            ADD=shared is not None, QUERIES=queries, GROUPS=groups, HALF=head_dim // 2,
            HALF_BLOCK=power_of_two(head_dim // 2), HEADS=power_of_two(queries + 2 * groups), num_warps=4,
        )  # fmt: skip
    return out


def split_heads_reference(
    projected: Tensor,
    table: Tensor,
    table_rows: Tensor,
    queries: int,
    kv: Tensor,
    slots: Tensor,
    shared: Tensor | None = None,
) -> Tensor:
    """Plain twin of `split_heads`, by `rotate`."""
    if shared is not None:
        projected = projected + shared[table_rows]
    groups, head_dim = kv.shape[-2:]
    heads = projected.view(projected.shape[0], queries + 2 * groups, head_dim)
    turned = rotate(heads[:, : queries + groups], table[:, table_rows, None])
    kv[slots, 0] = turned[:, queries:]
    kv[slots, 1] = heads[:, queries + groups :]
    return turned[:, :queries].contiguous()


def join_heads(
    query_gradient: Tensor, kv_gradient: Tensor, table: Tensor, table_rows: Tensor, slots: Tensor, total: Tensor
) -> Tensor:
    """Return the gradient [T, (N + 2G) D] of the projections, from the gradients of the results of `split_heads`.

    `query_gradient` [T, N, D]; `kv_gradient` [slots, 2, G, D]. The gradient is also added to the rows `table_rows`,
    which are distinct, of `total` [P, (N + 2G) D]: the gradient of the projections that all unroll steps share.
    """
    if not runs_kernels(table):
        return join_heads_reference(query_gradient, kv_gradient, table, table_rows, slots, total)
    rows, queries, head_dim = query_gradient.shape
    groups = kv_gradient.shape[-2]
    out = total.new_empty(rows, (queries + 2 * groups) * head_dim)
    if rows:
        _join_kernel[(rows,)](
            query_gradient, kv_gradient, table, table_rows, slots, out, total, total.stride(0), table.stride(0),
            QUERIES=queries, GROUPS=groups, HALF=head_dim // 2, HALF_BLOCK=power_of_two(head_dim // 2),
            HEADS=power_of_two(queries + 2 * groups), num_warps=4,
        )  # fmt: skip
    return out


def join_heads_reference(
    query_gradient: Tensor, kv_gradient: Tensor, table: Tensor, table_rows: Tensor, slots: Tensor, total: Tensor
) -> Tensor:
    """Plain twin of `join_heads`, by `rotate` with the sines negated."""
    keys, values = kv_gradient[slots].unbind(1)
    turned = torch.cat((query_gradient.to(keys.dtype), keys), dim=1)
    back = torch.stack((table[0], -table[1]))
    out = torch.cat((rotate(turned, back[:, table_rows, None]), values), dim=1).flatten(1).to(total.dtype)
    total[table_rows] += out
    return out


@jit(varying=("table_stride",))
def _split_kernel(
    projected, shared, table, table_rows, out, kv, slots, stride, shared_stride, table_stride, ADD: tl.constexpr,
    QUERIES: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, HEADS: tl.constexpr,
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
    in_pointer = projected + row * stride + heads * (2 * HALF) + half[None, :]
    first = tl.load(in_pointer, mask=held, other=0.0).to(tl.float32)
    second = tl.load(in_pointer + HALF, mask=held, other=0.0).to(tl.float32)
    if ADD:
        shared_pointer = shared + table_row * shared_stride + heads * (2 * HALF) + half[None, :]
        first += tl.load(shared_pointer, mask=held, other=0.0).to(tl.float32)
        second += tl.load(shared_pointer + HALF, mask=held, other=0.0).to(tl.float32)
    turned_first = (first * cos - second * sin).to(out.dtype.element_ty)
    turned_second = (second * cos + first * sin).to(out.dtype.element_ty)
    asks = held & (heads < QUERIES)
    out_pointer = out + row * (QUERIES * 2 * HALF) + heads * (2 * HALF) + half[None, :]
    tl.store(out_pointer, turned_first, mask=asks)
    tl.store(out_pointer + HALF, turned_second, mask=asks)
    if GROUPS > 0:
        slot = tl.load(slots + row)
        answers = held & (heads >= QUERIES)
        kv_pointer = kv + slot * (2 * GROUPS * 2 * HALF) + (heads - QUERIES) * (2 * HALF) + half[None, :]
        tl.store(kv_pointer, turned_first, mask=answers)
        tl.store(kv_pointer + HALF, turned_second, mask=answers)


@jit(varying=("table_stride",))
def _join_kernel(
    query_gradient, kv_gradient, table, table_rows, slots, out, total, total_stride, table_stride,
    QUERIES: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, HEADS: tl.constexpr,
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
    asks = held & (heads < QUERIES)
    q_pointer = query_gradient + row * (QUERIES * 2 * HALF) + heads * (2 * HALF) + half[None, :]
    first = tl.load(q_pointer, mask=asks, other=0.0).to(tl.float32)
    second = tl.load(q_pointer + HALF, mask=asks, other=0.0).to(tl.float32)
    if GROUPS > 0:
        slot = tl.load(slots + row)
        answers = held & (heads >= QUERIES)
        kv_pointer = kv_gradient + slot * (2 * GROUPS * 2 * HALF) + (heads - QUERIES) * (2 * HALF) + half[None, :]
        first += tl.load(kv_pointer, mask=answers, other=0.0).to(tl.float32)
        second += tl.load(kv_pointer + HALF, mask=answers, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    back_first = (first * cos + second * sin).to(dtype)
    back_second = (second * cos - first * sin).to(dtype)
    column = heads * (2 * HALF) + half[None, :]
    out_pointer = out + row * ((QUERIES + 2 * GROUPS) * 2 * HALF) + column
    tl.store(out_pointer, back_first, mask=held)
    tl.store(out_pointer + HALF, back_second, mask=held)
    total_pointer = total + table_row * total_stride + column
    tl.store(total_pointer, tl.load(total_pointer, mask=held, other=0.0) + back_first, mask=held)
    tl.store(total_pointer + HALF, tl.load(total_pointer + HALF, mask=held, other=0.0) + back_second, mask=held)
