"""What rows of an unroll step see, which blocks of keys and queries meet by it, and what attention leaves behind.

Shape suffixes as in `attention`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draftcache.draft_train.drafts.eagle3.kernels.runs import Runs


@dataclass(frozen=True)
class Sight:
    """What the rows of one unroll step see."""

    rows: Tensor
    """[T] int64 start rows, ascending: where their own keys are."""
    positions: Tensor
    """[T] int32, ascending: positions at step 0."""
    key_positions: Tensor
    """[R] int32, ascending."""
    step: int
    window: int
    runs: Runs | None = None
    """Where attention goes through `flash_attention`; else it goes through kernels of our own."""

    def key_spans(self, block: int) -> Tensor:
        """[4, blocks] int32 of every block of queries: the keys that some row sees are first .. last, and all rows see
        whole_first .. whole_last. Rows: first, whole_first, whole_last, last.
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
        """[4, blocks] int32 of every block of keys: as `key_spans`, of the queries that see some or all of them."""
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


@dataclass(frozen=True)
class Attended:
    """Attention's operands and results, which its backward pass reads."""

    q: Tensor
    """[T, N, D]."""
    kv: Tensor
    diagonal: Tensor
    sight: Sight
    out: Tensor
    """[T, N, D]."""
    log_sum_exp: Tensor
    """[N, T], float32 at least."""


def _ends(positions: Tensor, block: int) -> Tensor:
    """The last position of every block."""
    ends = positions[block - 1 :: block]
    return ends.contiguous() if positions.shape[0] % block == 0 else torch.cat((ends, positions[-1:]))
