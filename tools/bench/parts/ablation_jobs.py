"""Commands of the ablations as child processes: a few at once, the most urgent first, each with a log of its own."""

from __future__ import annotations

import heapq
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from draftcache.store.common.child_processes import end_with_parent
from draftcache.store.common.errors import WorkerError

_SHOWN_LINES = 5
"""Last lines of a failed command's log that its error holds."""


class Jobs:
    """Runs `draftcache` commands for many threads, at most `count` at once. Those of a lower priority number go first.

    A command's stderr goes to `logs`/NAME.log. Where OMP_NUM_THREADS is not set, commands share the cores evenly.
    """

    def __init__(self, count: int, logs: Path) -> None:
        self._logs = logs
        self._free = count
        self._stopped = False
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int]] = []
        self._numbers = itertools.count()
        threads = max(1, len(os.sched_getaffinity(0)) // count)
        self._environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        logs.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, priority: int, *words: object) -> str:
        """Run one command when its turn comes, and return its stdout.

        Raises WorkerError, with the end of the log, where the exit code is not 0. A command that was killed goes on
        from what it has saved when the same words are run again.
        """
        log = self._logs / f"{name}.log"
        with self._turn(priority), log.open("a", encoding="utf-8") as file:
            print("$ draftcache", *words, file=file, flush=True)
            done = subprocess.run(
                [sys.executable, "-m", "draftcache.tools.cli", *map(str, words)],
                env=self._environment,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                check=False,
                preexec_fn=end_with_parent(signal.SIGTERM),  # what is saved is whole, and the next try finds no lock
            )
        if done.returncode not in ((0, 1) if words[0] == "prepare" else (0,)):  # 1: some rows were quarantined
            last = log.read_text(encoding="utf-8").splitlines()[-_SHOWN_LINES:]
            raise WorkerError(
                f"draftcache {words[0]} ({name}): expected exit code 0, found {done.returncode}; {log} ends with: "
                + " | ".join(last)
            )
        return done.stdout

    def stop(self) -> None:
        """Let no further command begin; those that run are not ended."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @contextmanager
    def _turn(self, priority: int) -> Iterator[None]:
        mine = (priority, next(self._numbers))
        with self._changed:
            heapq.heappush(self._waiting, mine)
            self._changed.wait_for(lambda: self._stopped or (self._free > 0 and self._waiting[0] == mine))
            if self._stopped:
                raise WorkerError(
                    "expected no stop before all commands were run, found one; run the same command again"
                )
            heapq.heappop(self._waiting)
            self._free -= 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify_all()
