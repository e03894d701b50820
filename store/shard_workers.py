"""Checks many shards side by side, in processes that end with this one, however it ends."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool

from draftcache.store.common.errors import WorkerError
from draftcache.store.common.worker_pool import WorkerPool
from draftcache.store.known_shards import KnownShard
from draftcache.store.shard_checks import ShardReport, check_shard
from draftcache.store.storage.base import Location

_PROCESSES_FROM = 8
"""Shards from which on processes are started. Fewer are not worth the start."""
_QUICK_AT_ONCE = 16
"""Most shards of one task where sizes alone are checked, which takes a moment. A shard to read is a task of its own: so
its result is known, and noted in a journal, as soon as it is read."""


def check_shards(
    location: Location, in_full: Mapping[int, bool], known: Mapping[int, KnownShard], workers: int | None
) -> Generator[ShardReport, None, None]:
    """Yield the report of each shard of `in_full`, which says whether it is read in full, as soon as it is checked.

    `known` is what an object store was found to hold of shards. With processes, the order is any. Close the iterator
    where it is not exhausted: then the processes end at once.
    Raises WorkerError where a process dies.
    """
    processes = min(workers or os.cpu_count() or 1, len(in_full))
    to_read = any(number not in known for number in in_full) or any(in_full.values())
    if processes < 2 or len(in_full) < _PROCESSES_FROM or not to_read:
        for number, full in in_full.items():
            yield check_shard(location, number, known.get(number), quick=not full)
        return
    try:
        with WorkerPool(processes) as pool:
            futures = [
                pool.submit(_check, str(location), [(number, known.get(number)) for number in numbers], quick=quick)
                for numbers, quick in _tasks(in_full, processes)
            ]
            for future in as_completed(futures):
                yield from future.result()
    except BrokenProcessPool as exc:
        raise WorkerError(
            "verify: a worker process died (killed, or out of memory); nothing was changed. Try fewer --workers"
        ) from exc


def _tasks(in_full: Mapping[int, bool], processes: int) -> Iterator[tuple[list[int], bool]]:
    """Yield the shards of each task, and whether only their sizes are checked. The long tasks come first."""
    yield from (([number], False) for number, full in in_full.items() if full)
    quick = [number for number, full in in_full.items() if not full]
    most = max(1, min(_QUICK_AT_ONCE, len(quick) // (4 * processes)))
    yield from ((quick[first : first + most], True) for first in range(0, len(quick), most))


def _check(location: Location, shards: list[tuple[int, KnownShard | None]], *, quick: bool) -> list[ShardReport]:
    return [check_shard(location, number, known, quick=quick) for number, known in shards]
