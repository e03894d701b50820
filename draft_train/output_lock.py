"""The lock on a run's directory: two runs in one would interleave their checkpoints and metrics.

It is a lock on a file of the directory, which the kernel releases when the process ends, however it ends. The file
stays, because removing it would let two processes lock two files of one name.

Some filesystems have no locks, or pretend to have them. The file therefore also names the run that began last, and a
run that finds another name there stops before it writes anything more.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from draftcache.draft_train.ranks import Ranks
from draftcache.store.common.errors import DraftcacheError, InputError
from draftcache.store.common.locks import take_lock

LOCK_NAME = ".lock"


class OutputLock:
    """The lock of a run, on the rank that holds it. Other ranks have one that says nothing."""

    def __init__(self, path: Path | None = None) -> None:
        """`path` is the file of the lock that this process has just taken."""
        self._path = path
        self._name = f"process {os.getpid()} of {socket.gethostname()}, run {uuid.uuid4().hex[:8]}"
        if path is not None:
            path.write_text(self._name, encoding="utf-8")

    def require_held(self) -> None:
        """Raise InputError where another run has begun in the directory meanwhile."""
        found = self._name if self._path is None else self._path.read_text(encoding="utf-8")
        if self._path is not None and found != self._name:
            raise InputError(
                f"{self._path.parent}: expected no other run at work there, found {found}, which has begun since: "
                "this run stops and leaves the directory to it; choose another --output for one of them"
            )


@contextmanager
def output_lock(output: Path, ranks: Ranks) -> Iterator[OutputLock]:
    """Create the directory `output` and keep other runs out of it. Rank 0 holds the lock for all ranks.

    Raises InputError, on every rank, where another process trains into this directory.
    """
    problem: DraftcacheError | None = None
    held = OutputLock()
    with ExitStack() as stack:
        if ranks.leads:
            output.mkdir(parents=True, exist_ok=True)
            try:
                held = stack.enter_context(_locked(output / LOCK_NAME))
            except DraftcacheError as exc:
                problem = exc
        ranks.agree(problem)
        yield held


@contextmanager
def _locked(path: Path) -> Iterator[OutputLock]:
    lock = take_lock(path)
    if lock is None:
        raise InputError(
            f"{path.parent}: expected no other run at work there, found {path.read_text(encoding='utf-8')}; "
            "wait until it has ended, or choose another --output"
        )
    try:
        yield OutputLock(path)
    finally:
        lock.release()
