"""Ranged reads of objects, in parallel, straight into the caller's buffers."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

from draftcache.store.common.errors import ShardDamagedError, StorageError, StoreNotFoundError
from draftcache.store.storage.obstore_module import PART

_PARALLEL_CALLS = 8

_T = TypeVar("_T")


class ReadableObjects(Protocol):
    """What a read needs of the object storage."""

    def describe(self, name: str = "") -> str:
        """Return the URL of a name, for messages."""

    def size(self, name: str) -> int | None:
        """Return the bytes of an object, or None where there is none."""

    def call(self, doing: str, name: str, call: Callable[[Any, Any], _T], *, writes: bool = False) -> _T:
        """Return `call(obstore, client)`, which is tried again where that can help. Raises StorageError."""


class ShortAnswerError(OSError):
    """An object store answered a range with fewer bytes than were asked for."""


class ObjectRangeFile:
    """An object that is read by ranged GETs of up to 8 MiB, 8 at a time. Implements `RangeFile`."""

    def __init__(self, storage: ReadableObjects, name: str, size: int) -> None:
        """`size` is the object's, in bytes."""
        self._storage, self._name, self.size = storage, name, size

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        views = [buffer.cast("B") for buffer in buffers if buffer.nbytes]
        starts = [0, *itertools.accumulate(view.nbytes for view in views)]
        self._require(self.size, offset + starts[-1])

        def part(low: int) -> None:
            length = min(PART, starts[-1] - low)
            _scatter(self._fetch(offset + low, length), low, views, starts)

        in_parallel(part, range(0, starts[-1], PART))

    def _fetch(self, offset: int, length: int) -> memoryview:
        def get(obstore: Any, client: Any) -> memoryview:
            data = memoryview(obstore.get_range(client, self._name, start=offset, length=length))
            if data.nbytes != length:
                raise ShortAnswerError(f"the answer held {data.nbytes} of {length} bytes")
            return data

        try:
            return self._storage.call(f"read bytes {offset} to {offset + length} of", self._name, get)
        except StoreNotFoundError as exc:
            raise self._damaged(f"{self.size} bytes, found no file any more") from exc
        except StorageError as exc:
            size = self._storage.size(self._name)
            if size is not None:
                self._require(size, offset + length)  # the object may have been replaced by a shorter one
            if isinstance(exc.__cause__, ShortAnswerError):
                raise self._damaged(f"{length} bytes from {offset} on, but {exc.__cause__}") from exc
            raise

    def _damaged(self, expected_and_found: str) -> ShardDamagedError:
        return ShardDamagedError(
            f"{self._storage.describe(self._name)}: expected {expected_and_found}; run `draftcache repair` on the "
            "store, then the capture command again"
        )

    def _require(self, size: int, end: int) -> None:
        if size < end:
            raise self._damaged(f"at least {end} bytes, found {size}; the file was cut")

    def close(self) -> None:
        """Do nothing: an object that is read holds no resource between two reads."""


def _scatter(data: memoryview, position: int, views: Sequence[memoryview], starts: Sequence[int]) -> None:
    """Copy `data`, which begins at offset `position` of the views laid end to end (view i begins at starts[i])."""
    number = bisect.bisect_right(starts, position) - 1
    while data.nbytes:
        inside = position - starts[number]
        count = min(data.nbytes, views[number].nbytes - inside)
        views[number][inside : inside + count] = data[:count]
        data, position, number = data[count:], position + count, number + 1


def in_parallel(call: Callable[[Any], None], items: Sequence[Any]) -> None:
    """Call `call` with every item, 8 at a time, and raise the first error."""
    if len(items) <= 1:
        for item in items:
            call(item)
        return
    with ThreadPoolExecutor(min(len(items), _PARALLEL_CALLS)) as pool:
        futures = [pool.submit(call, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
