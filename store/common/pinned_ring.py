"""A ring of host memory that is taken once, bounded, and pinned where a GPU copies to it or from it.

Pinning memory costs about a second for every four gigabytes, so nothing is pinned while a device waits. Capture copies
what it computed through one ring, training copies what it reads ahead through another.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 512
"""Every stretch begins at a multiple of this many bytes, so that any dtype may lie there."""
_POLL_S = 0.05


def aligned(size: int) -> int:
    """`size` bytes, rounded up to the next place where a stretch may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass
class _Stretch:
    start: int
    end: int
    memory: Tensor
    returned: bool = False


class PinnedRing:
    """Hands out stretches of one block of memory, in a ring. Safe to use from several threads.

    Stretches may be given back in any order, but room is found behind the newest one only, so that a stretch that is
    kept for long keeps those behind it from being used again.
    """

    def __init__(self, size: int, *, pinned: bool) -> None:
        """`size` in bytes. `pinned` needs a CUDA device."""
        self._size, self._pinned = size, pinned
        self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self._taken: deque[_Stretch] = deque()
        """Oldest first."""
        self._changed = threading.Condition()

    def take(self, size: int, *, wait: Callable[[], bool] = lambda: False, larger_alone: bool = False) -> Tensor | None:
        """A stretch of `size` >= 1 bytes as uint8 [size], or None where there is no room for it.

        As long as `wait()` says that other stretches will come back, this call waits for room instead. A stretch larger
        than the whole ring is None too, unless `larger_alone`: then it gets memory of its own as soon as nothing else
        is in use, and the ring counts as full until it comes back.
        """
        with self._changed:
            while (found := self._find(size, larger_alone)) is None:
                if (size > self._size and not larger_alone) or not wait():
                    return None
                self._changed.wait(_POLL_S)
            self._taken.append(found)
            return found.memory

    def _find(self, size: int, larger_alone: bool) -> _Stretch | None:
        if size > self._size:
            if self._taken or not larger_alone:
                return None
            return _Stretch(0, self._size, torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned))
        start = self._start(aligned(size), size)
        if start is None:
            return None
        return _Stretch(start, start + aligned(size), self._memory[start : start + size])

    def _start(self, room: int, size: int) -> int | None:
        """Where a stretch may begin: behind the newest one, or at the beginning. The last one needs no padding."""
        if not self._taken:
            return 0
        oldest, newest = self._taken[0], self._taken[-1]
        if newest.start < oldest.start:  # what is in use goes round the end
            return newest.end if room <= oldest.start - newest.end else None
        if newest.end + size <= self._size:
            return newest.end
        return 0 if room <= oldest.start else None

    def give_back(self, memory: Tensor) -> None:
        """Return what `take` gave. Its memory may be overwritten from now on."""
        with self._changed:
            for stretch in self._taken:
                if not stretch.returned and stretch.memory.data_ptr() == memory.data_ptr():
                    stretch.returned = True
                    break
            else:
                raise ValueError("expected memory that this ring has handed out, found other memory")
            while self._taken and self._taken[0].returned:
                self._taken.popleft()
            self._changed.notify_all()
