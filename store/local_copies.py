"""Copies of committed files on this machine's disk, so that checks which read them several times fetch them once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import xxhash

from draftcache.store.common.errors import DraftcacheError, ShardDamagedError, StorageError
from draftcache.store.format.commits import Record, check_hash, check_size
from draftcache.store.storage.asking import ask_again, ask_side_by_side
from draftcache.store.storage.base import Storage
from draftcache.store.storage.local import LocalStorage

_BLOCK_BYTES = 32 << 20
"""Bytes of a file that are fetched at a time, by four ranges side by side."""
_FILES_AT_ONCE = 4
"""Files that are copied at a time: with their blocks, 128 MiB of memory."""


class LocalCopy(LocalStorage):
    """Files of an object store in a directory of this machine. Messages name them by their URLs."""

    def __init__(self, root: Path, source: Storage) -> None:
        super().__init__(root)
        self._source = source

    def describe(self, name: str = "") -> str:
        return self._source.describe(name)


class CopyError(StorageError):
    """The disk of this machine could not take a copy, which says nothing about the store."""


def copy_file(storage: Storage, name: str, size: int, path: Path) -> str:
    """Copy a file of `size` bytes of a store to a path, and return the xxh3-128 of these bytes.

    Each byte is fetched once, and memory holds 32 MiB of them. Raises CopyError where the copy can't be written, and
    the errors of `Storage.open` and `RangeFile.read_into`.
    """
    digest, buffer = xxhash.xxh3_128(), np.empty(min(_BLOCK_BYTES, size), np.uint8)
    file = storage.open(name, size=size)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as copy:
            for offset in range(0, size, _BLOCK_BYTES):
                block = buffer[: min(_BLOCK_BYTES, size - offset)].data
                file.read_into(offset, [block])
                digest.update(block)
                copy.write(block)
    except OSError as exc:
        if isinstance(exc, DraftcacheError):
            raise
        raise CopyError(
            f"{path}: could not write a copy of {storage.describe(name)} ({exc.strerror or exc}); free {size:,} bytes "
            "there, or set TMPDIR to a larger disk, and run the same command again"
        ) from exc
    finally:
        file.close()
    return digest.hexdigest()


def copy_committed(
    storage: Storage, record: Record, names: Iterable[str], sizes: Mapping[str, int], root: Path
) -> dict[str, str]:
    """Copy committed files below a directory, and return the problem of each that is not as committed, by name.

    `sizes` holds the bytes that each file has in the store; one that is left out is missing. Damaged files are copied
    too, as far as they can be read. A file whose hash is wrong is fetched again before that counts. Raises CopyError,
    and StorageError where the store does not answer any more.
    """

    def fetch(name: str) -> tuple[str, str]:
        size = sizes.get(name)

        def look() -> None:
            if size is not None and name in record["files"]:
                found = copy_file(storage, name, size, root / name)
                check_size(storage, record, name, size)
                check_hash(storage, record, name, found)

        try:
            ask_again(storage, look)
            check_size(storage, record, name, size)
        except CopyError:
            raise
        except ShardDamagedError as exc:
            return name, str(exc)
        except StorageError as exc:
            storage.size(name)  # where the store does not answer this either, that is not the file's damage
            return name, str(exc)
        return name, ""

    problems = ask_side_by_side(storage, fetch, names, at_once=_FILES_AT_ONCE)
    return {name: problem for name, problem in problems if problem}
