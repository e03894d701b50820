"""Rows of an unroll step that follow one another without a gap, and the keys that each such run sees.

Shape suffixes as in `attention`; B runs, M their keys, one run's behind the other's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draftcache.draft_train.drafts.eagle3.memory import MOST_COPIES


@dataclass(frozen=True)
class Runs:
    """Which rows are neighbours, and which keys every run of them sees."""

    rows: Tensor
    """[B + 1] int32: where the runs of queries begin and end."""
    keys: Tensor
    """[B + 1] int32: where their keys do, among M."""
    first: Tensor
    """[B] int64: the first key of each, among R."""
    last: Tensor
    """[B] int64: the key behind the last."""
    total_keys: int
    longest_rows: int
    longest_keys: int
    copies: int
    """Runs that see one and the same key, at most."""
    every: bool
    """Whether there is one run, which sees all keys."""

    def taken(self) -> Tensor:
        """[M] int64: which of the R keys."""
        lengths = self.last - self.first
        number = torch.arange(self.total_keys, device=self.first.device)
        return number + torch.repeat_interleave(
            self.first - self.keys[:-1].long(), lengths, output_size=self.total_keys
        )

    def add(self, total: Tensor, gradient: Tensor) -> None:
        """Add gradients [M, ...] of the runs' keys to those of all, [R, ...], in the order of the runs."""
        if self.every:
            total += gradient
            return
        key = torch.arange(total.shape[0], device=total.device)
        run = torch.searchsorted(self.last, key, right=True)
        behind = torch.searchsorted(self.first, key, right=True)
        for _ in range(self.copies):
            near = run.clamp(max=self.first.shape[0] - 1)
            place = (self.keys[near] + key - self.first[near]).clamp(0, self.total_keys - 1)
            seen = (run < behind).view(-1, *[1] * (total.dim() - 1))
            total += torch.where(seen, gradient[place], 0.0)
            run = run + 1


def find_runs(
    positions: NDArray[Any],
    key_positions: NDArray[Any],
    step: int,
    window: int,
    device: torch.device,
    most_copies: int = MOST_COPIES,
) -> Runs | None:
    """Runs of rows at `positions` [T] over keys at `key_positions` [R], both ascending, as `Sight` has them.

    None where `attention_kernels` should do the step: rows see none of these keys, a key is missing between others that
    a run sees (flash counts places), or many short runs would see more than `most_copies` times the keys there are.
    """
    if window <= step:
        return None
    ends = np.flatnonzero(np.diff(positions) != 1) + 1
    rows = np.concatenate(([0], ends, [positions.size]))
    lowest = positions[rows[:-1]] - (window - step) + 1
    first = np.searchsorted(key_positions, lowest)
    last = np.searchsorted(key_positions, positions[rows[1:] - 1], side="right")
    lengths = last - first
    gapless = bool((key_positions[last - 1] - key_positions[first] == lengths - 1).all())
    if not gapless or lengths.sum() > most_copies * key_positions.size:
        return None

    def there(values: NDArray[Any], dtype: type) -> Tensor:
        made = torch.from_numpy(np.ascontiguousarray(values, dtype))
        return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made

    return Runs(
        rows=there(rows, np.int32),
        keys=there(np.concatenate(([0], np.cumsum(lengths))), np.int32),
        first=there(first, np.int64),
        last=there(last, np.int64),
        total_keys=int(lengths.sum()),
        longest_rows=int(np.diff(rows).max()),
        longest_keys=int(lengths.max()),
        copies=int((np.searchsorted(first, last) - np.arange(first.size)).max()),
        every=bool(lengths.size == 1 and lengths[0] == key_positions.size),
    )
