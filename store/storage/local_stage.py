"""A shard's directory on a local disk while it is written, and how it takes its name beside rivals without any lock.

Every attempt has a directory of its own, `.NNNNN.OWNER-RANDOM.partial`, with the files in `files/`. `files/` is renamed
to the shard's name, and the emptied directory stays until the attempt is over, as its claim. A directory that is in
place already is replaced only if nobody who may be alive has a claim on the shard and no commit record names it: then a
killed writer left it. Otherwise the attempt takes a name of its own, as on object stores, and the first commit record
decides which of the directories is the shard. Locks spare work; no committed shard depends on them.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from draftcache.store.common.attempts import Attempt, attempt_path
from draftcache.store.common.errors import InputError, StorageError, StoreNotFoundError
from draftcache.store.common.failures import WRONG_PATH_NUMBERS
from draftcache.store.common.files import Buffer, fsync_directory

_IOV_MAX = 1024  # buffers per system call, on Linux


@contextmanager
def explained(path: Path, doing: str) -> Iterator[None]:
    """Turn the OSErrors of the code inside into errors of ours, which name the path.

    StoreNotFoundError: nothing is there; InputError: this can be no path; StorageError: all else.
    """
    try:
        yield
    except FileNotFoundError as exc:
        raise StoreNotFoundError(f"{path}: expected a file of the store, found nothing there") from exc
    except OSError as exc:
        if exc.errno in WRONG_PATH_NUMBERS:
            raise InputError(f"{path}: expected the path of a store's file, found none ({exc.strerror})") from exc
        raise StorageError(
            f"{path}: could not be {doing} ({exc.strerror or exc}); what was committed before is untouched: "
            "mend the cause and run the same command again"
        ) from exc


class LocalStageFile:
    """A file that is written by writev. Implements `StageFile`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with explained(path, "created"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, buffers: Sequence[Buffer]) -> None:
        pending = [view.cast("B") for item in buffers if (view := memoryview(item)).nbytes]
        with explained(self._path, "written"):
            while pending:
                pending = rest_after(pending, os.writev(self._descriptor, pending[:_IOV_MAX]))

    def close(self) -> None:
        if self._descriptor < 0:
            return
        try:
            with explained(self._path, "made durable"):
                os.fsync(self._descriptor)
        finally:
            self.discard()

    def discard(self) -> None:
        """Close the file without making it durable."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def rest_after(buffers: list[memoryview], count: int) -> list[memoryview]:
    """Return the rest of the buffers after their first `count` bytes."""
    for number, buffer in enumerate(buffers):
        if count < buffer.nbytes:
            return [buffer.cast("B")[count:], *buffers[number + 1 :]]
        count -= buffer.nbytes
    return []


class LocalStage:
    """A directory under a name of its own attempt, which is renamed when it is whole. Implements `Stage`."""

    def __init__(self, final: Path, name: str) -> None:
        self._final, self._name = final, name
        self._files: list[LocalStageFile] = []
        self._claim = attempt_path(final)
        self._partial = self._claim / "files"
        self._published: Path | None = None
        with explained(self._partial, "created"):
            self._partial.mkdir(parents=True)

    def open(self, name: str) -> LocalStageFile:
        self._files.append(LocalStageFile(self._partial / name))
        return self._files[-1]

    def publish(self, is_committed: Callable[[], bool]) -> str:
        """Rename the directory, to the shard's name or, where a rival may have that, to one of this attempt."""
        with explained(self._final, "published"):
            for directory, _, _ in os.walk(self._partial):  # the files were made durable when they were closed
                fsync_directory(Path(directory))
            if self._final.exists() and not self._claimed_by_others() and not is_committed():
                shutil.rmtree(self._final, ignore_errors=True)
            try:
                self._published = self._partial.rename(self._final)
            except OSError as exc:
                if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                own = self._final.with_name(f"{self._final.name}-{uuid.uuid4().hex[:8]}")
                self._published = self._partial.rename(own)
            fsync_directory(self._final.parent)
        return self._name.removesuffix(self._final.name) + self._published.name

    def _claimed_by_others(self) -> bool:
        """Return whether another attempt on this shard may still be alive."""
        for path in self._final.parent.iterdir():
            attempt = Attempt.named(path)
            if attempt and attempt.final == self._final.name and path != self._claim and not attempt.has_ended():
                return True
        return False

    def settle(self) -> None:
        shutil.rmtree(self._claim, ignore_errors=True)

    def abandon(self) -> None:
        for file in self._files:
            file.discard()
        if self._published is not None:
            shutil.rmtree(self._published, ignore_errors=True)
        self.settle()
