"""From projected rows to rotated heads, and back to the projections' gradients.

Rotation is in the half form: (a, b) -> (a cos - b sin, b cos + a sin) for the halves a and b of a head.
Shape suffixes: T rows, N query heads, G key-value heads, D head width. Projections hold queries, keys and values side
by side, any of N and G may be 0; key-value memory is [slots, 2, G, D], keys first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftcache.store.common.triton_launch import jit, power_of_two, runs_kernels, tl


def rotary_table(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """[2, P, D/2]: cosines and sines of int64 positions [P], from angles in float64."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim)
    angles = torch.outer(positions.double(), frequencies)
    return torch.stack((angles.cos(), angles.sin())).to(torch.promote_types(dtype, torch.float32))


def rotate(heads: Tensor, table: Tensor) -> Tensor:
    """Heads [..., D] by a table [2, ..., D/2] that fits them, in the heads' dtype."""
    cos, sin = table
    first, second = heads.to(table.dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(heads.dtype)


def split_heads(
    projected: Tensor,
    table: Tensor,
    places: Tensor,
    queries: int,
    kv: Tensor,
    slots: Tensor,
    shared: Tensor | None = None,
) -> Tensor:
    """Rotated queries [T, N, D] of `projected` [T, (N + 2G) D]; keys (rotated) and values go to rows `slots` of `kv`.

    `places` [T] int64: row of the table of each row. `queries` N; with `kv` of G = 0 nothing but queries is there.
    `shared` [P, (N + 2G) D], where given: its rows `places` are added first.
    """
    if not runs_kernels(projected):
        return split_heads_reference(projected, table, places, queries, kv, slots, shared)
    rows, head_dim, groups = projected.shape[0], kv.shape[-1], kv.shape[-2]
    out = projected.new_empty(rows, queries, head_dim)
    if rows:
        added = projected if shared is None else shared
        _split_kernel[(rows,)](
            projected, added, table, places, out, kv, slots, projected.stride(0), added.stride(0), table.stride(0),
            ADD=shared is not None, QUERIES=queries, GROUPS=groups, HALF=head_dim // 2,
            HALF_BLOCK=power_of_two(head_dim // 2), HEADS=power_of_two(queries + 2 * groups), num_warps=4,
        )  # fmt: skip
    return out


def split_heads_reference(
    projected: Tensor,
    table: Tensor,
    places: Tensor,
    queries: int,
    kv: Tensor,
    slots: Tensor,
    shared: Tensor | None = None,
) -> Tensor:
    """See `split_heads`."""
    if shared is not None:
        projected = projected + shared[places]
    groups, head_dim = kv.shape[-2:]
    heads = projected.view(projected.shape[0], queries + 2 * groups, head_dim)
    turned = rotate(heads[:, : queries + groups], table[:, places, None])
    kv[slots, 0] = turned[:, queries:]
    kv[slots, 1] = heads[:, queries + groups :]
    return turned[:, :queries].contiguous()


def join_heads(
    query_gradient: Tensor, kv_gradient: Tensor, table: Tensor, places: Tensor, slots: Tensor, total: Tensor
) -> Tensor:
    """Gradient [T, (N + 2G) D] of the projections from those of `split_heads`' results.

    `query_gradient` [T, N, D]; `kv_gradient` [slots, 2, G, D]. The gradient is also added to the rows `places`, which
    are distinct, of `total` [P, (N + 2G) D]: the part of the projections that every unroll step shares.
    """
    if not runs_kernels(table):
        return join_heads_reference(query_gradient, kv_gradient, table, places, slots, total)
    rows, queries, head_dim = query_gradient.shape
    groups = kv_gradient.shape[-2]
    out = total.new_empty(rows, (queries + 2 * groups) * head_dim)
    if rows:
        _join_kernel[(rows,)](
            query_gradient, kv_gradient, table, places, slots, out, total, total.stride(0), table.stride(0),
            QUERIES=queries, GROUPS=groups, HALF=head_dim // 2, HALF_BLOCK=power_of_two(head_dim // 2),
            HEADS=power_of_two(queries + 2 * groups), num_warps=4,
        )  # fmt: skip
    return out


def join_heads_reference(
    query_gradient: Tensor, kv_gradient: Tensor, table: Tensor, places: Tensor, slots: Tensor, total: Tensor
) -> Tensor:
    """See `join_heads`."""
    keys, values = kv_gradient[slots].unbind(1)
    turned = torch.cat((query_gradient.to(keys.dtype), keys), dim=1)
    back = torch.stack((table[0], -table[1]))
    out = torch.cat((rotate(turned, back[:, places, None]), values), dim=1).flatten(1).to(total.dtype)
    total[places] += out
    return out


@jit(varying=("table_stride",))
def _split_kernel(
    projected, shared, table, places, out, kv, slots, stride, shared_stride, table_stride, ADD: tl.constexpr,
    QUERIES: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, HALF_BLOCK)
    heads = tl.arange(0, HEADS)[:, None]
    place = tl.load(places + row)
    inside = half < HALF
    cos = tl.load(table + place * HALF + half, mask=inside, other=1.0)[None, :]
    sin = tl.load(table + table_stride + place * HALF + half, mask=inside, other=0.0)[None, :]
    turns = heads < QUERIES + GROUPS
    cos = tl.where(turns, cos, 1.0)
    sin = tl.where(turns, sin, 0.0)
    held = inside[None, :] & (heads < QUERIES + 2 * GROUPS)
    place_in = projected + row * stride + heads * (2 * HALF) + half[None, :]
    first = tl.load(place_in, mask=held, other=0.0).to(tl.float32)
    second = tl.load(place_in + HALF, mask=held, other=0.0).to(tl.float32)
    if ADD:
        place_shared = shared + place * shared_stride + heads * (2 * HALF) + half[None, :]
        first += tl.load(place_shared, mask=held, other=0.0).to(tl.float32)
        second += tl.load(place_shared + HALF, mask=held, other=0.0).to(tl.float32)
    turned_first = (first * cos - second * sin).to(out.dtype.element_ty)
    turned_second = (second * cos + first * sin).to(out.dtype.element_ty)
    asks = held & (heads < QUERIES)
    place_out = out + row * (QUERIES * 2 * HALF) + heads * (2 * HALF) + half[None, :]
    tl.store(place_out, turned_first, mask=asks)
    tl.store(place_out + HALF, turned_second, mask=asks)
    if GROUPS > 0:
        slot = tl.load(slots + row)
        answers = held & (heads >= QUERIES)
        place_kv = kv + slot * (2 * GROUPS * 2 * HALF) + (heads - QUERIES) * (2 * HALF) + half[None, :]
        tl.store(place_kv, turned_first, mask=answers)
        tl.store(place_kv + HALF, turned_second, mask=answers)


@jit(varying=("table_stride",))
def _join_kernel(
    query_gradient, kv_gradient, table, places, slots, out, total, total_stride, table_stride,
    QUERIES: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    half = tl.arange(0, HALF_BLOCK)
    heads = tl.arange(0, HEADS)[:, None]
    place = tl.load(places + row)
    inside = half < HALF
    cos = tl.load(table + place * HALF + half, mask=inside, other=1.0)[None, :]
    sin = tl.load(table + table_stride + place * HALF + half, mask=inside, other=0.0)[None, :]
    turns = heads < QUERIES + GROUPS
    cos = tl.where(turns, cos, 1.0)
    sin = tl.where(turns, sin, 0.0)
    held = inside[None, :] & (heads < QUERIES + 2 * GROUPS)
    asks = held & (heads < QUERIES)
    place_q = query_gradient + row * (QUERIES * 2 * HALF) + heads * (2 * HALF) + half[None, :]
    first = tl.load(place_q, mask=asks, other=0.0).to(tl.float32)
    second = tl.load(place_q + HALF, mask=asks, other=0.0).to(tl.float32)
    if GROUPS > 0:
        slot = tl.load(slots + row)
        answers = held & (heads >= QUERIES)
        place_kv = kv_gradient + slot * (2 * GROUPS * 2 * HALF) + (heads - QUERIES) * (2 * HALF) + half[None, :]
        first += tl.load(place_kv, mask=answers, other=0.0).to(tl.float32)
        second += tl.load(place_kv + HALF, mask=answers, other=0.0).to(tl.float32)
    dtype = out.dtype.element_ty
    back_first = (first * cos + second * sin).to(dtype)
    back_second = (second * cos - first * sin).to(dtype)
    column = heads * (2 * HALF) + half[None, :]
    place_out = out + row * ((QUERIES + 2 * GROUPS) * 2 * HALF) + column
    tl.store(place_out, back_first, mask=held)
    tl.store(place_out + HALF, back_second, mask=held)
    place_total = total + place * total_stride + column
    tl.store(place_total, tl.load(place_total, mask=held, other=0.0) + back_first, mask=held)
    tl.store(place_total + HALF, tl.load(place_total + HALF, mask=held, other=0.0) + back_second, mask=held)
