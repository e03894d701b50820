"""The lock on a run's directory: two runs in one would interleave their checkpoints and metrics.

It is a lock on a file of the directory, which the kernel releases when the process ends, however it ends. The file
stays, because removing it would let two processes lock two files of one name.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from draftcache.draft_train.ranks import Ranks
from draftcache.store.common.errors import DraftcacheError, InputError
from draftcache.store.common.locks import take_lock

LOCK_NAME = ".lock"


@contextmanager
def output_lock(output: Path, ranks: Ranks) -> Iterator[None]:
    """Create the directory `output` and keep other runs out of it. Rank 0 holds the lock for all ranks.

    Raises InputError, on every rank, where another process trains into this directory.
    """
    problem: DraftcacheError | None = None
    with ExitStack() as stack:
        if ranks.leads:
            output.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(_locked(output / LOCK_NAME))
            except DraftcacheError as exc:
                problem = exc
        ranks.agree(problem)
        yield


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = take_lock(path)
    if lock is None:
        raise InputError(
            f"{path.parent}: expected no other run at work there, found {path.read_text(encoding='utf-8')}; "
            "wait until it has ended, or choose another --output"
        )
    try:
        if not lock.works:
            print(f"{path}: this filesystem gives no locks: see to it that no other run writes there", file=sys.stderr)
        os.ftruncate(lock.descriptor, 0)
        os.pwrite(lock.descriptor, f"process {os.getpid()} of {socket.gethostname()}".encode(), 0)
        yield
    finally:
        lock.release()
