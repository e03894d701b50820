"""The attention mask of block drafts, as sorted positions, and the ranges of rows and blocks that follow from it.

Shape suffixes are those of `attention`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockMask:
    """Which keys the slots of S blocks see, without a mask tensor.

    Slot j of block s is at position `start_positions[s] + 1 + j`. It sees the context row r if
    `positions[r] <= start_positions[s]` and its own position minus `positions[r]` is below `window`. It sees slot i of
    its own block if i and j are less than `window` apart and i <= j or the layer is not causal. Blocks do not see one
    another. Packed conversations are kept apart by the window alone, so their positions must be shifted that far.
    """

    start_rows: Tensor
    """[S] int64, ascending: the context row behind which each block is anchored."""
    start_positions: Tensor
    """[S] int32: the positions of the start rows."""
    positions: Tensor
    """[R] int32, strictly ascending: positions of the context rows."""
    window: int
    """Attention window in positions, at least 1. A window beyond every position admits all rows."""
    causal: bool
    """Whether a slot sees no later slot of its block."""

    def part(self, blocks: slice, rows: slice | None = None) -> BlockMask:
        """Return the mask of a slice of the blocks over a slice of the context rows, or over all of them.

        The rows must hold every row that these blocks see. Slices have no step, and that of rows has a start.
        """
        taken = slice(0, None) if rows is None else rows
        return BlockMask(
            self.start_rows[blocks] - taken.start,
            self.start_positions[blocks],
            self.positions[taken],
            self.window,
            self.causal,
        )

    def context_seen(self, slots: int) -> Tensor:
        """Return the definition of visible context as a tensor of bool [S, B, R]; `slots` is B."""
        starts = self.start_positions.long()[:, None, None]
        own = starts + 1 + torch.arange(slots, device=starts.device)[:, None]
        positions = self.positions.long()
        return (positions <= starts) & (own - positions < self.window)

    def slots_seen(self, slots: int) -> Tensor:
        """Return the definition of the visible slots of a block as a tensor of bool [B, B]: [j, i] is i seen by j."""
        slot = torch.arange(slots, device=self.positions.device)
        ahead = slot[None, :] - slot[:, None]
        return (ahead.abs() < self.window) & ((ahead <= 0) | (not self.causal))

    def context_range(self, slots: int) -> tuple[Tensor, Tensor]:
        """Return low [S, B] and high [S], int32: a slot sees the context rows low .. high - 1, which may be none.

        Both ascend, low along either dimension. They stay on the device, without waiting for it.
        """
        own = self.start_positions.long()[:, None] + 1 + torch.arange(slots, device=self.positions.device)
        low = torch.searchsorted(self.positions.long(), own - self.window, right=True, out_int32=True)
        return low, (self.start_rows + 1).int()


def block_spans(low: Tensor, high: Tensor, rows: int, tile: int) -> Tensor:
    """Return the blocks that see each tile of context rows, [4, tiles] int32, from a `BlockMask.context_range`.

    `rows` is R. The four rows are first, whole_first, whole_last and last. All slots of the blocks whole_first ..
    whole_last - 1 see all rows of the tile, and no block outside first .. last - 1 sees one of them.
    """
    begin = torch.arange(0, rows, tile, device=low.device, dtype=torch.int32)
    end = (begin + tile).clamp(max=rows)
    lowest, highest = low[:, 0].contiguous(), low[:, -1].contiguous()
    return torch.stack(
        (
            torch.searchsorted(high, begin, right=True, out_int32=True),
            torch.searchsorted(high, end, out_int32=True),
            torch.searchsorted(highest, begin, right=True, out_int32=True),
            torch.searchsorted(lowest, end, out_int32=True),
        )
    )
