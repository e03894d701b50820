"""A store in a directory: files are read by preadv, written by writev, and published by rename or link.

Processes of one machine exclude each other by flock.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from draftcache.store.common.attempts import attempt_path, is_idle, remove_ended
from draftcache.store.common.errors import ShardDamagedError, StoreNotFoundError
from draftcache.store.common.files import Buffer, fsync_directory
from draftcache.store.common.locks import FileLock, take_lock
from draftcache.store.storage.local_stage import LocalStage, LocalStageFile, explained, rest_after

_IOV_MAX = 1024  # buffers per system call, on Linux
LOCKS_DIRECTORY = ".locks"
"""Where the locks of a store's writers are. Its existence also says that the directory was taken for a store."""
_FORMER_STAGE = ".[0-9][0-9][0-9][0-9][0-9].partial"  # the name per shard of former versions, which tells no owner


def _unless_missing(exc: OSError) -> None:
    """Raise an error of a walk, so that no list is short without a word. A missing directory is an empty one."""
    if not isinstance(exc, FileNotFoundError):
        raise exc


def _require_regular(path: Path) -> None:
    """Raise StoreNotFoundError where there is no file, or a pipe, whose reading would wait for ever; StorageError."""
    with explained(path, "read"):
        try:
            mode = path.stat().st_mode
        except NotADirectoryError as exc:  # there is a file where the store's directory should be
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from exc
    if not stat.S_ISREG(mode):
        raise StoreNotFoundError(f"{path}: expected a file of the store, found something that is no regular file")


class LocalRangeFile:
    """A file that is read by preadv, straight into the caller's buffers. Implements `RangeFile`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        _require_regular(path)
        with explained(path, "opened"):
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.size = os.fstat(self._descriptor).st_size

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        pending = [buffer for buffer in buffers if buffer.nbytes]
        with explained(self._path, "read"):
            while pending:
                count = os.preadv(self._descriptor, pending[:_IOV_MAX], offset)
                if count == 0:
                    end = offset + sum(item.nbytes for item in pending)
                    raise ShardDamagedError(
                        f"{self._path}: expected at least {end} bytes, found {self.size}; the file was cut"
                    )
                offset += count
                pending = rest_after(pending, count)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        self.close()


class LocalStorage:
    """A directory, which the first write creates. Implements `Storage`."""

    pauses: Sequence[float] = ()

    def __init__(self, root: Path) -> None:
        self.local_root = root

    def describe(self, name: str = "") -> str:
        return str(self.local_root / name)

    def size(self, name: str) -> int | None:
        path = self.local_root / name
        with explained(path, "read"):
            return path.stat().st_size if path.is_file() else None

    def read(self, name: str) -> bytes:
        path = self.local_root / name
        _require_regular(path)
        with explained(path, "read"):
            return path.read_bytes()

    def open(self, name: str, *, size: int | None = None) -> LocalRangeFile:
        return LocalRangeFile(self.local_root / name)

    def list(self, directory: str) -> list[str]:
        names = []
        seen: set[tuple[int, int]] = set()
        top = self.local_root / directory
        with explained(top, "listed"):
            for folder, directories, files in os.walk(top, onerror=_unless_missing, followlinks=True):
                base = Path(folder).relative_to(self.local_root)
                directories[:] = [item for item in directories if not item.startswith(".")]
                with suppress(FileNotFoundError):  # it may have been removed since
                    found = Path(folder).stat()
                    if (found.st_dev, found.st_ino) in seen:  # a link led to a directory above
                        directories[:], files = [], []
                    seen.add((found.st_dev, found.st_ino))
                names += [(base / item).as_posix() for item in files if not item.startswith(".")]
        return sorted(names)

    def list_sizes(self, directory: str) -> dict[str, int]:
        sizes = ((name, self.size(name)) for name in self.list(directory))
        return {name: size for name, size in sizes if size is not None}  # it may have been removed since

    def put(self, name: str, data: Buffer) -> None:
        with self._beside(name) as (partial, final):
            self._write(partial, data)
            partial.replace(final)

    def create(self, name: str, data: Buffer) -> bool:
        # A hard link is the one call that publishes a whole file only where none exists.
        with self._beside(name) as (partial, final):
            self._write(partial, data)
            try:
                os.link(partial, final)
            except FileExistsError:
                return False
        return True

    def put_file(self, name: str, path: Path) -> None:
        with self._beside(name) as (partial, final):
            shutil.copyfile(path, partial)
            descriptor = os.open(partial, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            partial.replace(final)

    @contextmanager
    def _beside(self, name: str) -> Iterator[tuple[Path, Path]]:
        """Yield a temporary path beside a file's final path, and the final path.

        Afterwards the temporary path is removed and the directory made durable.
        """
        final = self.local_root / name
        partial = attempt_path(final)
        with explained(final, "written"):
            final.parent.mkdir(parents=True, exist_ok=True)
            try:
                yield partial, final
            finally:
                partial.unlink(missing_ok=True)
            fsync_directory(final.parent)

    def _write(self, path: Path, data: Buffer) -> None:
        file = LocalStageFile(path)
        try:
            file.write([data])
        finally:
            file.close()

    def delete(self, name: str) -> None:
        path = self.local_root / name
        with explained(path, "removed"):
            if path.is_file():
                path.unlink()
                fsync_directory(path.parent)

    def delete_directory(self, directory: str) -> None:
        path = self.local_root / directory
        with explained(path, "removed"):
            if path.is_dir():
                shutil.rmtree(path)
                fsync_directory(path.parent)

    def move_directory(self, source: str, target: str) -> None:
        path = self.local_root / target
        with explained(path, "moved"):
            path.parent.mkdir(parents=True, exist_ok=True)
            old = self.local_root / source
            if old.is_symlink():  # a relative link would lead nowhere from its new place
                path.symlink_to(old.resolve())
                old.unlink()
            else:
                old.rename(path)
            fsync_directory(path.parent)
            fsync_directory(old.parent)

    def stage(self, directory: str) -> LocalStage:
        return LocalStage(self.local_root / directory, directory)

    def lock(self, name: str, *, shared: bool = False) -> FileLock | None:
        path = self.local_root / LOCKS_DIRECTORY / name
        with explained(path, "locked"):
            return take_lock(path, shared=shared)

    def remove_leftovers(self, directories: Sequence[str]) -> None:
        """Remove the temporary files that killed writers left in these directories, not in those below them."""
        for directory in directories:
            path = self.local_root / directory
            with explained(path, "cleaned"):
                remove_ended(path)
                for former in path.glob(_FORMER_STAGE):
                    if is_idle(former):
                        shutil.rmtree(former, ignore_errors=True)
