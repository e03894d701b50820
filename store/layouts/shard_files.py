"""Files of a shard while it is written: hashed as they go, so that a commit record costs no second pass."""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np
import xxhash
from numpy.typing import NDArray

from draftcache.store.common.files import Buffer
from draftcache.store.storage.base import Stage, StageFile

Files = dict[str, dict[str, Any]]
"""{name: {"bytes", "xxh3_128"}}, as in commit records."""

PARALLEL_BYTES = 1 << 22
"""A conversation of fewer bytes is written before threads would have begun."""

Result = TypeVar("Result")


class Run(Protocol):
    """Does something now or later: what it returns waits for the result, or makes it."""

    def __call__(self, function: Callable[[], Result], /) -> Callable[[], Result]:
        """See the class."""


def run_later(function: Callable[[], Result]) -> Callable[[], Result]:
    """When the result is asked for."""
    return function


def run_now(function: Callable[[], Result]) -> Callable[[], Result]:
    """In one of a few threads of this process, which take functions in the order of the calls."""
    return _pool(os.getpid()).submit(function).result


@functools.cache
def _pool(_process: int) -> ThreadPoolExecutor:
    """Of this process: threads do not survive a fork."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="draftcache-arrays")


class HashedFile:
    """A staged file whose size and xxh3-128 are known when it is closed, with no second pass over it."""

    def __init__(self, file: StageFile) -> None:
        self._file = file
        self._digest = xxhash.xxh3_128()
        self.bytes = 0

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Append the buffers by one call."""
        self._file.write(buffers)
        for buffer in buffers:
            self._digest.update(buffer)
            self.bytes += memoryview(buffer).nbytes

    def close(self) -> dict[str, Any]:
        """Make it durable; returns its entry in the commit record."""
        self._file.close()
        return {"bytes": self.bytes, "xxh3_128": self._digest.hexdigest()}


def write_small_file(stage: Stage, name: str, data: bytes) -> dict[str, Any]:
    """Write a whole file; returns its entry in the commit record."""
    file = HashedFile(stage.open(name))
    file.write([data])
    return file.close()


def npy_bytes(array: NDArray[Any]) -> bytes:
    """A .npy file's bytes."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
