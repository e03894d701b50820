"""Computing, copying and writing at the same time: host memory for one conversation's arrays, and a writing thread."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draftcache.store.common.pinned_ring import PinnedRing

Item = TypeVar("Item")


class HostArrays:
    """Arrays of one conversation in host memory, filled piece by piece without waiting for the device.

    Copies from a GPU run on `stream`, into `memory` where it has room and else into newly pinned memory.
    """

    def __init__(self, stream: torch.cuda.Stream | None, memory: PinnedRing | None = None) -> None:
        self._stream, self._memory = stream, memory
        self._done = None if stream is None else torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._arrays: dict[str, Tensor] = {}
        self._filled: dict[str, int] = {}
        self._taken: list[Tensor] = []

    def add(self, parts: dict[str, Tensor], rows: dict[str, int], wait: Callable[[], bool] = lambda: False) -> None:
        """Append each part's rows to the array of its name; `rows` are the conversation's total numbers of rows.

        As long as `wait()` says that memory will be given back, this call waits for memory (`PinnedRing.take`).
        """
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        for name, part in parts.items():
            if name not in self._arrays:
                self._arrays[name] = self._empty((rows[name], *part.shape[1:]), part, wait)
                self._filled[name] = 0
            first = self._filled[name]
            self._filled[name] += part.shape[0]
            target = self._arrays[name][first : self._filled[name]]
            if self._stream is None or not part.is_cuda:
                target.copy_(part)
            else:
                with torch.cuda.stream(self._stream):
                    target.copy_(part, non_blocking=True)
                part.record_stream(self._stream)
        if self._done is not None:
            self._done.record(self._stream)

    def _empty(self, shape: tuple[int, ...], like: Tensor, wait: Callable[[], bool]) -> Tensor:
        size = math.prod(shape) * like.element_size()
        memory = self._memory.take(size, wait=wait) if self._memory is not None and size else None
        if memory is None:
            return torch.empty(shape, dtype=like.dtype, pin_memory=like.is_cuda)
        self._taken.append(memory)
        return memory.view(like.dtype).view(shape)

    @property
    def nbytes(self) -> int:
        """Bytes of host memory that the arrays take."""
        return sum(array.nbytes for array in self._arrays.values())

    def numpy(self) -> dict[str, NDArray[Any]]:
        """The arrays by name, valid until `release`; waits until all copies have arrived."""
        if self._done is not None:
            self._done.synchronize()
        assert all(self._filled[name] == array.shape[0] for name, array in self._arrays.items())
        return {name: np.asarray(array.numpy()) for name, array in self._arrays.items()}

    def release(self) -> None:
        """Give the memory back after the last copy into it; the caller must not use the arrays any more."""
        if self._done is not None:
            self._done.synchronize()
        self._arrays.clear()
        while self._taken:
            assert self._memory is not None
            self._memory.give_back(self._taken.pop(0))


class Writing(Generic[Item]):
    """A thread that calls `handle` for items in order; at most `limit` bytes of items wait in its queue.

    After the last item, when `close` has said that there is no other, it calls `last`. The next `put`, or `finish`,
    raises an exception of the thread. Items that come after an exception, or after `abandon`, are given to `drop`
    instead of `handle`, and `last` is not called.
    """

    def __init__(
        self,
        handle: Callable[[Item], None],
        limit: int,
        drop: Callable[[Item], None] | None = None,
        last: Callable[[], None] | None = None,
    ) -> None:
        self._handle, self._drop, self._last, self._limit = handle, drop, last, limit
        self._waiting = 0
        self._changed = threading.Condition()
        self._queue: SimpleQueue[tuple[Item, int] | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, name="draftcache-writing", daemon=True)
        self._thread.start()

    def put(self, item: Item, size: int) -> None:
        """Hand over an item of `size` bytes; waits for room in the queue, or, above the limit, for an empty queue."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._error is not None or not self._waiting or self._waiting + size <= self._limit
            )
            self._raise()
            self._waiting += size
        self._queue.put((item, size))

    @property
    def busy(self) -> bool:
        """Whether any item is not handled or dropped yet."""
        return self._waiting > 0

    def close(self) -> None:
        """Let the thread end after the items that it was given; no other may follow."""
        self._queue.put(None)

    def finish(self) -> None:
        """Close, and wait until every item is handled and `last` was called."""
        self.close()
        self._thread.join()
        self._raise()

    def abandon(self) -> None:
        """Drop the items that wait; returns when the thread has ended."""
        self._abandoned = True
        self.close()
        self._thread.join()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            item, size = entry
            try:
                if self._error is None and not self._abandoned:
                    self._handle(item)
                elif self._drop is not None:
                    self._drop(item)
            except BaseException as exc:
                self._error = exc
            with self._changed:
                self._waiting -= size
                self._changed.notify_all()
        try:
            if self._last is not None and self._error is None and not self._abandoned:
                self._last()
        except BaseException as exc:
            self._error = exc
