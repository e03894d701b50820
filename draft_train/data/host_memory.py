"""A ring of host memory for what is read ahead: taken once, bounded, and pinned where a GPU copies from it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch

ALIGNMENT = 256
"""Bytes: every region and every array in one begins at a multiple, wherever its dtype."""


def aligned(size: int) -> int:
    """`size` bytes, up to the next place where something may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Region:
    """A stretch of the ring that is in use."""

    first: int
    end: int
    memory: torch.Tensor
    """[bytes] uint8."""


class HostRing:
    """Regions are given back in the order in which they were taken. For one thread."""

    def __init__(self, size: int, *, pinned: bool) -> None:
        """`size` in bytes. Pinning takes about a second per 4 GB, which is why it is done once."""
        self._size = size
        self._pinned = pinned
        self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self._taken: deque[Region] = deque()

    def take(self, size: int) -> Region | None:
        """A region of `size` bytes, or None until others are given back.

        One that is larger than the ring has memory of its own, while nothing else is in use.
        """
        if size > self._size:
            if self._taken:
                return None
            region = Region(0, self._size, torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned))
        else:
            first = self._fit(size)
            if first is None:
                return None
            region = Region(first, first + aligned(size), self._memory[first : first + size])
        self._taken.append(region)
        return region

    def _fit(self, size: int) -> int | None:
        if not self._taken:
            return 0
        head, tail = self._taken[-1].end, self._taken[0].first
        if self._taken[-1].first < tail:  # what is in use goes round the end
            return head if size <= tail - head else None
        if size <= self._size - head:
            return head
        return 0 if size <= tail else None

    def give_back(self, region: Region) -> None:
        """The oldest one in use."""
        assert self._taken[0] is region, "regions come back in the order in which they were taken"
        self._taken.popleft()
