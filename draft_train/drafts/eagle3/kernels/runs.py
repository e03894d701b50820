"""Runs: rows of an unroll step at consecutive positions, with the keys that each run sees.

Shape suffixes are those of `attention`, with B runs and M keys of all runs, concatenated.
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
    """The runs of one unroll step. Several runs may see one key, which the M keys then contain several times."""

    rows: Tensor
    """[B + 1] int32: cumulative numbers of rows, so that run b has the query rows rows[b] .. rows[b + 1] - 1."""
    keys: Tensor
    """[B + 1] int32: cumulative numbers of keys, so that run b has the keys keys[b] .. keys[b + 1] - 1 of M."""
    first: Tensor
    """[B] int64: the first of the R step-0 keys that each run sees."""
    last: Tensor
    """[B] int64: the step-0 key after the last one that each run sees."""
    total_keys: int
    """M."""
    longest_rows: int
    """Most rows of a run."""
    longest_keys: int
    """Most keys of a run."""
    copies: int
    """The most runs that see the same key."""
    every: bool
    """Whether there is only one run, and it sees all keys."""

    def taken(self) -> Tensor:
        """Return which of the R step-0 keys each of the M keys is, [M] int64."""
        lengths = self.last - self.first
        number = torch.arange(self.total_keys, device=self.first.device)
        return number + torch.repeat_interleave(
            self.first - self.keys[:-1].long(), lengths, output_size=self.total_keys
        )

    def add(self, total: Tensor, gradient: Tensor) -> None:
        """Add the gradients [M, ...] of the runs' keys to `total` [R, ...], in the order of the runs."""
        if self.every:
            total += gradient
            return
        key = torch.arange(total.shape[0], device=total.device)
        run = torch.searchsorted(self.last, key, right=True)
        behind = torch.searchsorted(self.first, key, right=True)
        for _ in range(self.copies):
            near = run.clamp(max=self.first.shape[0] - 1)
            index = (self.keys[near] + key - self.first[near]).clamp(0, self.total_keys - 1)
            seen = (run < behind).view(-1, *[1] * (total.dim() - 1))
            total += torch.where(seen, gradient[index], 0.0)
            run = run + 1


def find_runs(
    positions: NDArray[Any],
    key_positions: NDArray[Any],
    step: int,
    window: int,
    device: torch.device,
    most_copies: int = MOST_COPIES,
) -> Runs | None:
    """Return the runs of rows at `positions` [T] over keys at `key_positions` [R], both ascending as in `StepMask`.

    The result is None if `attention_kernels` should compute the step: rows see none of these keys; the positions of a
    run's keys have a gap (FlashAttention counts its window in keys); or many short runs together would see more than
    `most_copies` times R keys.
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

    def to_device(values: NDArray[Any], dtype: type) -> Tensor:
        made = torch.from_numpy(np.ascontiguousarray(values, dtype))
        return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made

    return Runs(
        rows=to_device(rows, np.int32),
        keys=to_device(np.concatenate(([0], np.cumsum(lengths))), np.int32),
        first=to_device(first, np.int64),
        last=to_device(last, np.int64),
        total_keys=int(lengths.sum()),
        longest_rows=int(np.diff(rows).max()),
        longest_keys=int(lengths.max()),
        copies=int((np.searchsorted(first, last) - np.arange(first.size)).max()),
        every=bool(lengths.size == 1 and lengths[0] == key_positions.size),
    )
