"""Where a store's bytes live: one small interface over local disks and object stores.

Names are relative, with "/" between parts, as in commit records. A shard is staged first: its files become part of
the store only by `Stage.publish` and then by their commit record, which `create` writes only where none exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeAlias
from urllib.parse import unquote, urlparse

from draftcache.store.common.files import Buffer

Location: TypeAlias = str | Path
"""A directory, or the URL of one: `file://`, `s3://bucket/prefix`, `gs://`, `az://`."""


class RangeFile(Protocol):
    """One file, open for reads at any offset."""

    @property
    def size(self) -> int:
        """Bytes."""

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill the writable buffers, one after the other, from `offset` on.

        Raises ShardDamagedError where the file ends before they are full, StorageError where it cannot be read.
        """

    def close(self) -> None:
        """Let go of the file."""


class StageFile(Protocol):
    """One file that is being written, front to back."""

    def write(self, buffers: Sequence[Buffer]) -> None:
        """Append the buffers; they may be reused when this returns. Raises StorageError."""

    def close(self) -> None:
        """Make the file durable. Raises StorageError."""


class Stage(Protocol):
    """A directory that is being written, out of readers' sight."""

    def open(self, name: str) -> StageFile:
        """Start a file; `name` may have parts."""

    def publish(self) -> str:
        """Make everything durable under its final place; returns that directory's name in the store."""

    def abandon(self) -> None:
        """Remove what was staged or published and has no commit record."""


class Lock(Protocol):
    """Held until released, or until the process dies."""

    def release(self) -> None:
        """Let go."""


class Storage(Protocol):
    """A root directory or an object-store prefix."""

    @property
    def local_root(self) -> Path | None:
        """The directory, or None for an object store."""

    def describe(self, name: str = "") -> str:
        """Path or URL of a name, for messages."""

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None where there is none."""

    def read(self, name: str) -> bytes:
        """A whole file. Raises StoreNotFoundError where there is none, StorageError where it cannot be read."""

    def open(self, name: str) -> RangeFile:
        """Open a file. Raises as `read`."""

    def list(self, directory: str) -> list[str]:
        """Names of all files below a directory (recursive, relative to the root), sorted; [] where there is none.

        Files under temporary names are left out.
        """

    def put(self, name: str, data: Buffer) -> None:
        """Write a whole file, atomically and durably, over any that is there."""

    def create(self, name: str, data: Buffer) -> bool:
        """The same, only where there is none: False, and nothing changed, where there is one already."""

    def delete(self, name: str) -> None:
        """Remove a file; nothing happens where there is none."""

    def delete_directory(self, directory: str) -> None:
        """Remove all files below a directory; nothing happens where there is none."""

    def move_directory(self, source: str, target: str) -> None:
        """Give a directory another name."""

    def put_file(self, name: str, path: Path) -> None:
        """Copy a local file in, atomically and durably, over any that is there."""

    def stage(self, directory: str) -> Stage:
        """Start writing a directory under a temporary name; leftovers of an earlier attempt are removed."""

    def lock(self, name: str, *, shared: bool = False) -> Lock | None:
        """Take a lock among the processes of this machine, or None where another one holds it.

        Object stores have no locks: there it is always granted, and `create` alone decides who was first.
        """


def open_storage(location: Location) -> Storage:
    """A directory (plain path or `file://`), or an object store (`s3://bucket/prefix`, `gs://`, `az://`)."""
    from draftcache.store.storage.local import LocalStorage  # both import this module

    text = str(location)
    if "://" not in text:
        return LocalStorage(Path(text))
    if text.startswith("file://"):
        return LocalStorage(Path(unquote(urlparse(text).path)))
    from draftcache.store.storage.object_store import ObjectStorage

    return ObjectStorage(text)
