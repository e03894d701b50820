"""What the kernels of `attention` share: tile sizes, rows of a tile, edges of its loops, and which keys are seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from draftcache.draft_train.drafts.block.kernels.block_mask import BlockMask
from draftcache.store.common.triton_launch import jit, tl

SIZES = ("tokens", "keys", "window")
"""Arguments of the kernels that change from call to call: no variant is compiled for their values."""

WHOLE, MASKED, OWN = (0, 1, 2) if tl is None else (tl.constexpr(0), tl.constexpr(1), tl.constexpr(2))
"""Kinds of loops: over context that all rows see, over context that some see, and over slots of the own block."""


OWN_TILE = 16
"""Slots in a tile of own keys, where these are few: the least of a product."""


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of a kernel over operands of 16 bits."""

    queries: int
    """Queries in a tile."""
    keys: int
    """Keys in a tile."""
    warps: int
    """Warps of a program."""
    stages: int
    """Tiles of the loop that are in shared memory at a time."""


def launch_parameters(q: Tensor, tiles: Tiles, wide: Tiles) -> dict[str, Any]:
    """Return a kernel's launch parameters for queries [..., D]; `wide` are the tiles for D = 256.

    Float32 operands get smaller tiles, because they take twice the shared memory, and exact products, because the tests
    that use them need these.
    """
    if q.dtype == torch.float32:
        return {"BLOCK_Q": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1, "PRECISION": "ieee"}
    chosen = wide if q.shape[-1] > 128 else tiles
    sizes = {"BLOCK_Q": chosen.queries, "BLOCK_K": chosen.keys}
    return {**sizes, "num_warps": chosen.warps, "num_stages": chosen.stages, "PRECISION": "tf32"}


def own_tile(turns: int, keys: int) -> int:
    """Return how many slots of own blocks a program over queries takes at a time, of up to `keys`.

    128 queries of 16 heads a group (`turns`) have the slots of one block or two, those of 2 heads have 64 and more.
    """
    return OWN_TILE if turns >= 8 else keys


def kernel_shape(q: Tensor, groups: int, mask: BlockMask) -> dict[str, Any]:
    """Return the constants of the kernels for queries [S, B, N, D]."""
    slots, heads, width = q.shape[1:]
    return {"HEADS": heads, "GROUPS": groups, "WIDTH": width, "SLOTS": slots, "CAUSAL": mask.causal}


@jit
def query_rows(row, group, tokens, HEADS: tl.constexpr, GROUPS: tl.constexpr):
    """Return token (slot of any block) and head of each query row of a group, and whether it exists.

    A row that does not exist gets those of the last one.
    """
    turns: tl.constexpr = HEADS // GROUPS
    near = tl.minimum(row, tokens * turns - 1)
    return near // turns, group * turns + near % turns, row < tokens * turns


@jit
def is_seen(key, token, row_low, row_high, window, KIND: tl.constexpr, SLOTS: tl.constexpr, CAUSAL: tl.constexpr):
    """Return whether queries see keys, from tensors that broadcast. In loops over own slots, keys are tokens too."""
    if KIND == OWN:
        behind = token - key
        seen = (token // SLOTS == key // SLOTS) & (behind < window)
        seen = seen & (behind >= 0) if CAUSAL else seen & (-behind < window)
    else:
        seen = (key >= row_low) & (key < row_high)
    return seen


@jit
def loop_edges(
    low, high, tile, tokens, TURNS: tl.constexpr, SLOTS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Return first and last block of a tile of queries, and the edges of its three loops over context.

    `low` and `high` ascend, so the first row of the first block and the last of the last one bound all others.
    """
    first_block = tile * BLOCK_Q // (TURNS * SLOTS)
    last_block = (tl.minimum(tile * BLOCK_Q + BLOCK_Q, tokens * TURNS) - 1) // (TURNS * SLOTS)
    first = tl.load(low + first_block * SLOTS)
    whole_first = tl.load(low + last_block * SLOTS + SLOTS - 1)
    whole_last = tl.load(high + first_block)
    last = tl.load(high + last_block)
    middle, rest = whole_edges(first, whole_first, whole_last, BLOCK_K)
    return first_block, last_block, first, middle, rest, last


@jit
def whole_edges(first, whole_first, whole_last, BLOCK: tl.constexpr):
    """Return where the loop over whole tiles starts and ends: at multiples of BLOCK from `first`, inside the bounds."""
    middle = first + tl.cdiv(tl.maximum(whole_first - first, 0), BLOCK) * BLOCK
    return middle, middle + (tl.maximum(whole_last - middle, 0) // BLOCK) * BLOCK
