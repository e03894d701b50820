"""Where a store's bytes live: one small interface over local disks and object stores.

Names of files are relative to the store's root, with "/" between their parts, as in commit records. A shard is staged
first. Its files become part of the store only by `Stage.publish` and then by their commit record, which
`Storage.create` writes only where none exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeAlias
from urllib.parse import unquote, urlparse

from draftcache.store.common.files import Buffer
from draftcache.store.storage.local import LocalStorage

Location: TypeAlias = str | Path
"""A directory, or the URL of a directory or prefix: `file://`, `s3://bucket/prefix`, `gs://`, `az://`."""


class RangeFile(Protocol):
    """One file that is open for reads at any offset."""

    @property
    def size(self) -> int:
        """Size of the file in bytes."""

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the writable buffers, one after the other, with the file's bytes from `offset` on.

        Raises ShardDamagedError where the file ends before they are full or is there no more, and StorageError where
        it cannot be read.
        """

    def close(self) -> None:
        """Close the file."""


class StageFile(Protocol):
    """One file that is being written from front to back."""

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Append the buffers, which may be reused when this returns. Raises StorageError."""

    def close(self) -> None:
        """Make the file durable and close it. Raises StorageError."""


class Stage(Protocol):
    """A directory that is being written, which readers do not see yet."""

    def open(self, name: str) -> StageFile:
        """Start a file. `name` is relative to the directory and may have several parts."""

    def publish(self, is_committed: Callable[[], bool]) -> str:
        """Make everything durable under a final name. Returns the directory's name in the store.

        `is_committed` says whether there is a commit record for this directory by now. Files that are in place without
        one, and without anybody at work on them, may be replaced.
        """

    def settle(self) -> None:
        """Say that the commit record is written, so that nothing of this attempt is left but the published files."""

    def abandon(self) -> None:
        """Remove the directory, which has no commit record, whether it is published or not."""


class Lock(Protocol):
    """A lock that is held until it is released or the process dies."""

    def release(self) -> None:
        """Release the lock."""


class Storage(Protocol):
    """The files below a root directory or an object-store prefix.

    Reads and writes raise StorageError where the disk or object store refuses or breaks off.
    """

    @property
    def local_root(self) -> Path | None:
        """The root directory, or None for an object store."""

    @property
    def pauses(self) -> Sequence[float]:
        """Seconds to wait before each further look at something that must be there and is not, or is damaged.

        Empty where the first answer is the truth, as on a disk. `asking.ask_again` looks again.
        """

    def describe(self, name: str = "") -> str:
        """Return the path or URL of a name, for messages; of the root for an empty name."""

    def size(self, name: str) -> int | None:
        """Return the bytes of a file, or None where there is no file of this name."""

    def read(self, name: str) -> bytes:
        """Read a whole file. Raises StoreNotFoundError where there is none, StorageError where it cannot be read."""

    def open(self, name: str, *, size: int | None = None) -> RangeFile:
        """Open a file for reading. Raises the same errors as `read`.

        `size` is the file's, in bytes, where it is known already. An object store is not asked for it again, and a
        missing object is then noticed by the first read.
        """

    def list(self, directory: str) -> list[str]:
        """Return the names, relative to the root and sorted, of all files below a directory and its subdirectories.

        The result is [] where there is no such directory. Files under temporary names are left out.
        """

    def list_sizes(self, directory: str) -> dict[str, int]:
        """Return the bytes of all files that `list` names, by name and in the same order."""

    def put(self, name: str, data: Buffer) -> None:
        """Write a whole file, atomically and durably, over any file that is there."""

    def create(self, name: str, data: Buffer) -> bool:
        """Write a whole file, atomically and durably, only where there is none.

        Returns False, and changes nothing, where there is one already.
        """

    def delete(self, name: str) -> None:
        """Remove a file. Nothing happens where there is none."""

    def delete_directory(self, directory: str) -> None:
        """Remove all files below a directory. Nothing happens where there is none."""

    def move_directory(self, source: str, target: str) -> None:
        """Give a directory another name."""

    def put_file(self, name: str, path: Path) -> None:
        """Copy a local file into the store, atomically and durably, over any file that is there."""

    def stage(self, directory: str) -> Stage:
        """Start writing a directory that readers do not see before it is published."""

    def lock(self, name: str, *, shared: bool = False) -> Lock | None:
        """Take a lock among the processes of this machine, or return None where another process holds it.

        A `shared` lock may be held by several processes at once. Object stores have no locks: there it is always
        granted, and `create` alone decides who was first.
        """


def open_storage(location: Location) -> Storage:
    """Return the storage at a location, which need not exist yet.

    `location` is a directory (a plain path or `file://`), or an object store (`s3://bucket/prefix`, `gs://`, `az://`).
    Raises InputError for a URL of another form, or where an object store is named and obstore is not installed.
    """
    text = str(location)
    if "://" not in text:
        return LocalStorage(Path(text))
    if text.startswith("file://"):
        return LocalStorage(Path(unquote(urlparse(text).path)))
    from draftcache.store.storage.object_store import ObjectStorage  # a store on a disk needs nothing of it

    return ObjectStorage(text)
