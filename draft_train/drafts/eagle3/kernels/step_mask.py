"""The attention mask of one unroll step, as sorted positions, and the spans of keys and queries that follow from it.

Shape suffixes are those of `attention`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draftcache.draft_train.drafts.eagle3.kernels.runs import Runs


@dataclass(frozen=True)
class StepMask:
    """Which keys each of the T rows of one unroll step sees, without a mask tensor.

    A row at position t sees the step-0 keys at positions j with `j <= t` and `t + step - j < window`, and its diagonal
    keys of steps 1..step.
    """

    rows: Tensor
    """[T] int64 start rows, ascending: the rows of the diagonal keys that these rows see."""
    positions: Tensor
    """[T] int32, ascending: the rows' positions at step 0."""
    key_positions: Tensor
    """[R] int32, ascending: positions of the step-0 keys."""
    step: int
    """Number of the unroll step, from 0."""
    window: int
    """Attention window, in positions."""
    runs: Runs | None = None
    """If given, `flash_attention` computes this step; if None, `attention_kernels` does (on the CPU its plain twin)."""

    def key_spans(self, block: int) -> Tensor:
        """Return the keys that each block of `block` queries sees, [4, blocks] int32.

        The four rows are first, whole_first, whole_last and last. All queries of a block see the keys whole_first ..
        whole_last - 1, and none sees a key outside first .. last - 1.
        """
        first = self.positions[::block].contiguous()
        last = _ends(self.positions, block)
        lowest = self.step - self.window + 1
        return torch.stack(
            (
                torch.searchsorted(self.key_positions, first + lowest, out_int32=True),
                torch.searchsorted(self.key_positions, last + lowest, out_int32=True),
                torch.searchsorted(self.key_positions, first, right=True, out_int32=True),
                torch.searchsorted(self.key_positions, last, right=True, out_int32=True),
            )
        )

    def query_spans(self, block: int) -> Tensor:
        """Return the queries that see each block of `block` keys, [4, blocks] int32 as in `key_spans`."""
        first = self.key_positions[::block].contiguous()
        last = _ends(self.key_positions, block)
        beyond = self.window - self.step
        return torch.stack(
            (
                torch.searchsorted(self.positions, first, out_int32=True),
                torch.searchsorted(self.positions, last, out_int32=True),
                torch.searchsorted(self.positions, first + beyond, out_int32=True),
                torch.searchsorted(self.positions, last + beyond, out_int32=True),
            )
        )


def _ends(positions: Tensor, block: int) -> Tensor:
    """Return the last position of every block."""
    ends = positions[block - 1 :: block]
    return ends.contiguous() if positions.shape[0] % block == 0 else torch.cat((ends, positions[-1:]))
