"""How a storage is asked for many things side by side, and once more where an answer can't be right.

An object store takes tens of milliseconds per answer, so 50,000 questions in a row take most of an hour; and it may
answer with what was true a moment ago: that an object is not there yet, an earlier content, a part of a list. A disk
does neither, and is asked for one thing after the other, once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from draftcache.store.common.errors import StorageError, StoreError, StoreVersionError
from draftcache.store.storage.base import Storage

SIDE_BY_SIDE = 32
"""Questions that an object store is asked at a time."""
_AHEAD = 4 * SIDE_BY_SIDE
"""Answers that wait for the caller at most."""
_FINAL = (StorageError, StoreVersionError)
"""Errors that asking again does not mend: the storage has tried for long itself, or the answer is a whole one."""

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")


def ask_side_by_side(
    storage: Storage, ask: Callable[[_Item], _Answer], items: Iterable[_Item], *, at_once: int = SIDE_BY_SIDE
) -> Iterator[_Answer]:
    """Yield `ask(item)` for every item, in the items' order.

    An object store is asked `at_once` questions at a time, in as many threads, so that n answers take the time of
    n / `at_once`. Raises the error of the first item, in their order, whose question failed.
    """
    if storage.local_root is not None:
        yield from map(ask, items)
        return
    waiting: deque[Future[_Answer]] = deque()
    with ThreadPoolExecutor(at_once) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(ask, item))
                if len(waiting) >= _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:  # the caller may have seen enough, or an error ended it
            for future in waiting:
                future.cancel()


def ask_again(storage: Storage, ask: Callable[[], _Answer]) -> _Answer:
    """Return `ask()`, which is called again, after a pause, where it finds a damaged or missing file.

    It is called once more for each of `Storage.pauses`, of which a disk has none. Use it only where something else
    says that the file exists, such as a commit record or a list: a file that may well be missing should be told at
    once. Raises the last StoreError; StorageError and StoreVersionError at once.
    """
    for pause in storage.pauses:
        try:
            return ask()
        except _FINAL:
            raise
        except StoreError:
            time.sleep(pause)
    return ask()
