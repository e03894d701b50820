"""A pool of worker processes that end with this one, however it ends, and leave its signals to it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from draftcache.store.common.log_times import time_worker_lines
from draftcache.store.common.stopping import signals_held_back

_P = ParamSpec("_P")
_T = TypeVar("_T")


class WorkerPool(ProcessPoolExecutor):
    """A process pool to be used as a context manager, which ends its processes at once where an error leaves it.

    Processes are spawned: a forked one would inherit the locks of whatever threads this process has running.
    """

    def __init__(
        self, processes: int, initializer: Callable[..., None] | None = None, initargs: tuple[Any, ...] = ()
    ) -> None:
        """Have every process call `initializer(*initargs)` before its first task."""
        context = get_context("spawn")
        self._ours, self._theirs = context.Pipe(duplex=False)
        arguments = (self._ours, initializer, initargs)
        super().__init__(processes, mp_context=context, initializer=_start, initargs=arguments)

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        """Schedule a call, which may start a process."""
        with signals_held_back():
            return super().submit(fn, *args, **kwargs)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._theirs.close()
        self.shutdown(cancel_futures=True)
        self._theirs.close()
        self._ours.close()


def _start(pipe: Connection, initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    time_worker_lines()
    # The pipe closes by a kill of the parent too. A pool's own pipes do not: its workers hold both ends of them.
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    if initializer is not None:
        initializer(*initargs)


def _end_with(pipe: Connection) -> None:
    wait([pipe])
    os._exit(1)
