"""One file of states that vLLM has extracted: waited for, checked, read whole and deleted.

By vLLM's ExampleHiddenStatesConnector (0.26 and 0.32): while a request runs, the server makes PATH.lock and holds an
exclusive flock on it. It answers with PATH before the file is written, and lets the lock go once it is, or once writing
has failed. The file is the one that `peers.safetensors_files` describes.
"""

from __future__ import annotations

import fcntl
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from draftcache.capture.peers.safetensors_files import SpeculatorsReader
from draftcache.capture.peers.samples import DamagedSampleError, PeerSample
from draftcache.store.common.errors import GateError

LOCKED_SECONDS = 300.0
"""Longest time in which the server may write a file after it has answered."""
APPEARING_SECONDS = 3.0
"""Longest time after which a lock, or the file of a lock that is free, may become visible on a shared filesystem."""
_PAUSE_SECONDS = 0.002
_LONGEST_PAUSE_SECONDS = 0.05


class MissingStatesError(GateError):
    """The server has named a file that is not there, is not whole, or stays locked; it may come the next time."""


def take_states(path: Path, token_ids: NDArray[np.int64]) -> PeerSample:
    """Wait until the server has written the file, read its states into memory, and delete it with its lock.

    Raises MissingStatesError where there is no whole file, and GateError where its states are of other token ids than
    these [L]; such a file is left where it is.
    """
    _wait_until_written(path)
    try:
        (sample,) = SpeculatorsReader().read(path)
        states = sample.load()
    except DamagedSampleError as exc:
        raise MissingStatesError(str(exc)) from exc
    if not np.array_equal(sample.token_ids, token_ids):
        raise GateError(
            f"{path}: expected states of the {len(token_ids):,} token ids that were sent, found those of "
            f"{len(sample.token_ids):,} others"
        )
    for written in (path, _lock_of(path)):
        written.unlink(missing_ok=True)
    return replace(sample, load=lambda: states)


def discard(path: Path) -> None:
    """Delete a file that nobody will read, with its lock, if it is written."""
    if path.is_file() and _lock_of(path).is_file():
        for written in (path, _lock_of(path)):
            written.unlink(missing_ok=True)


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _wait_until_written(path: Path) -> None:
    begun, pause = time.monotonic(), _PAUSE_SECONDS
    while True:
        seconds, found = _state_of(path)
        if not found:
            return
        if time.monotonic() - begun > seconds:
            raise MissingStatesError(f"{path}: expected the states that the server names, {found} after {seconds:g} s")
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def _state_of(path: Path) -> tuple[float, str]:
    """How long to wait for the file, and what is there instead of it; "" where it is written."""
    try:
        with _lock_of(path).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if path.is_file():
                return 0.0, ""
            return APPEARING_SECONDS, "found its lock free and no file: the server could not write it, as its log says"
    except BlockingIOError:
        return LOCKED_SECONDS, "found its lock held"
    except FileNotFoundError:
        if path.is_file():
            return APPEARING_SECONDS, "found no .lock beside it: serve without use_synchronization_lock false"
        return (
            APPEARING_SECONDS,
            "found nothing: both have to see one folder, so run capture on the server's machine, or give the server a "
            "shared_storage_path on a filesystem of both",
        )
    except OSError as exc:
        return 0.0, f"found that its lock can't be read ({exc})"
