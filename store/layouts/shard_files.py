"""Files of a shard that is being written. They are hashed on the way, so that a commit record costs no second pass."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import xxhash

from draftcache.store.common.files import Buffer
from draftcache.store.storage.base import Stage, StageFile

Files = dict[str, dict[str, Any]]
"""{name: {"bytes", "xxh3_128"}}: the table of files, as commit records hold it."""

PARALLEL_BYTES = 1 << 22
"""A conversation of fewer bytes than this is written before threads would have begun."""

Result = TypeVar("Result")


class Run(Protocol):
    """`run_now` or `run_later`: a way to have a function called, at once or when its result is asked for."""

    def __call__(self, function: Callable[[], Result], /) -> Callable[[], Result]:
        """Return a function that returns the result of `function`, once that is there."""


def run_later(function: Callable[[], Result]) -> Callable[[], Result]:
    """Return the function itself, so that it runs when its result is asked for."""
    return function


def run_now(function: Callable[[], Result]) -> Callable[[], Result]:
    """Call a function in one of a few threads of this process, and return a function that waits for its result.

    The threads take functions in the order of the calls.
    """
    return _pool(os.getpid()).submit(function).result


@functools.cache
def _pool(_process: int) -> ThreadPoolExecutor:
    """Return the threads of this process. They are kept by process id, because threads do not survive a fork."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="draftcache-arrays")


class HashedFile:
    """A staged file that counts and hashes the bytes that are written to it."""

    def __init__(self, file: StageFile) -> None:
        self._file = file
        self._digest = xxhash.xxh3_128()
        self.bytes = 0

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Append the buffers by one call. Raises StorageError."""
        self._file.write(buffers)
        for buffer in buffers:
            self._digest.update(buffer)
            self.bytes += memoryview(buffer).nbytes

    def close(self) -> dict[str, Any]:
        """Make the file durable and close it. Returns its entry in the commit record."""
        self._file.close()
        return {"bytes": self.bytes, "xxh3_128": self._digest.hexdigest()}


def write_small_file(stage: Stage, name: str, data: bytes) -> dict[str, Any]:
    """Write a whole file. Returns its entry in the commit record."""
    file = HashedFile(stage.open(name))
    file.write([data])
    return file.close()
