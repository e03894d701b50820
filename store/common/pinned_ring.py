"""A ring of host memory that is allocated once, bounded, and pinned where a GPU copies to it or from it.

Pinning memory costs about a second for every four gigabytes, so nothing is pinned while a device waits. Capture copies
the computed states through one ring, and training copies the batches that it reads ahead through another.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 512
"""Every stretch begins at a multiple of this many bytes, so that it may hold any dtype."""
_POLL_S = 0.05


def aligned(size: int) -> int:
    """Return `size` rounded up to a multiple of `ALIGNMENT`, which is the next offset where a stretch may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass
class _Stretch:
    """One stretch that was handed out. Offsets are bytes within the ring."""

    start: int
    end: int
    memory: Tensor
    returned: bool = False


class PinnedRing:
    """A block of memory that is handed out in stretches, as a ring. It is safe to use from several threads.

    Stretches may be given back in any order, but room is found behind the newest one only. A stretch that is kept for
    long therefore keeps the stretches behind it from being used again.
    """

    def __init__(self, size: int, *, pinned: bool) -> None:
        """Allocate `size` bytes. `pinned` needs a CUDA device."""
        self._size, self._pinned = size, pinned
        self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        self._taken: deque[_Stretch] = deque()
        """Stretches that are handed out, the oldest first."""
        self._changed = threading.Condition()
        self.waited_s = 0.0
        """Seconds that `take` has waited for room, all calls together."""

    def take(self, size: int, *, wait: Callable[[], bool] = lambda: False, larger_alone: bool = False) -> Tensor | None:
        """Return a stretch of `size` >= 1 bytes as uint8 [size], or None where there is no room for it.

        As long as `wait()` returns True, because other stretches will come back, this call waits for room instead. The
        result is also None for a size above the whole ring's, unless `larger_alone` is set. Then separate memory is
        allocated for it as soon as nothing else is in use, and the ring counts as full until that memory comes back.
        """
        with self._changed:
            while (found := self._find(size, larger_alone)) is None:
                if (size > self._size and not larger_alone) or not wait():
                    return None
                began = time.monotonic()
                self._changed.wait(_POLL_S)
                self.waited_s += time.monotonic() - began
            self._taken.append(found)
            return found.memory

    def _find(self, size: int, larger_alone: bool) -> _Stretch | None:
        """Return a free stretch of `size` bytes, or None where there is none now."""
        if size > self._size:
            if self._taken or not larger_alone:
                return None
            return _Stretch(0, self._size, torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned))
        start = self._start(aligned(size), size)
        if start is None:
            return None
        return _Stretch(start, start + aligned(size), self._memory[start : start + size])

    def _start(self, room: int, size: int) -> int | None:
        """Return the offset where a stretch may begin: behind the newest one, or at the beginning. None means nowhere.

        `room` is `size` with padding, which the last stretch of the ring does not need.
        """
        if not self._taken:
            return 0
        oldest, newest = self._taken[0], self._taken[-1]
        if newest.start < oldest.start:  # the memory in use goes round the end
            return newest.end if room <= oldest.start - newest.end else None
        if newest.end + size <= self._size:
            return newest.end
        return 0 if room <= oldest.start else None

    def give_back(self, memory: Tensor) -> None:
        """Give back the memory that `take` returned, which may be overwritten from now on.

        Raises ValueError for memory that is not handed out.
        """
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
