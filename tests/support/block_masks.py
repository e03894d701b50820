"""Masks and operands of block attention: packed conversations with start rows, by their lengths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from draftcache.draft_train.drafts.block.kernels.block_mask import BlockMask

Operands = tuple[Tensor, Tensor, Tensor, Tensor | None]
"""Queries [S, B, N, D], context keys and values [R, 2, G, D], those of blocks [S, B, 2, G, D], and sinks [N]."""


def packed_positions(lengths: Sequence[int], window: int) -> Tensor:
    """Positions [R] int32 of conversations of these lengths, the first row of each just outside the last one's window.

    Slot 0 behind the first row of a conversation would see the row before it if they were one position closer.
    """
    parts, first = [], 0
    for length in lengths:
        parts.append(torch.arange(first, first + length))
        first += length - 1 + max(window - 1, 1)
    return torch.cat(parts).int()


def block_mask(
    positions: Tensor, starts: Tensor, window: int, causal: bool, device: torch.device | str = "cpu"
) -> BlockMask:
    """Make the mask of blocks behind the rows `starts` [S] of context rows at `positions` [R]."""
    rows = starts.to(device, torch.int64)
    there = positions.to(device, torch.int32)
    return BlockMask(rows, there[rows], there, window, causal)


def draw_operands(
    mask: BlockMask, slots: int, heads: int, groups: int, width: int, dtype: torch.dtype, sinks: bool = True
) -> Operands:
    """Draw operands of the mask's blocks on its device, with logits of tens; the sinks are float32 at least."""
    blocks, rows, device = mask.start_rows.numel(), mask.positions.numel(), mask.positions.device

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.float64).to(dtype)

    logits = (2 * draw(heads)).to(torch.promote_types(dtype, torch.float32))
    return (
        2 * draw(blocks, slots, heads, width),
        draw(rows, 2, groups, width),
        draw(blocks, slots, 2, groups, width),
        logits if sinks else None,
    )


def in_float64(operands: Operands) -> Operands:
    """Return the same operands in float64."""
    q, context_kv, block_kv, sinks = operands
    return q.double(), context_kv.double(), block_kv.double(), None if sinks is None else sinks.double()
