"""Checks committed files against their record: their sizes, and the hashes of their bytes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from draftcache.store.common.errors import DraftcacheError, ShardDamagedError
from draftcache.store.common.files import Buffer, hash_blocks
from draftcache.store.format.commits import Record, check_hash, check_size, require_size
from draftcache.store.local_copies import LocalCopy, copy_committed
from draftcache.store.storage.asking import ask_side_by_side
from draftcache.store.storage.base import Storage

_READ_BYTES = 1 << 22


@contextmanager
def checked_files(
    storage: Storage,
    record: Record,
    names: Iterable[str],
    *,
    quick: bool,
    sizes: Mapping[str, int] | None = None,
) -> Iterator[tuple[Storage, dict[str, str]]]:
    """Yield a storage of this machine that holds committed files, and the problem of each damaged one, by name.

    With `quick` only sizes are checked, and the storage is the given one. The bytes of an object store's files are
    fetched once: they are hashed on their way to a temporary directory, which needs room for all of them. `sizes` holds
    the bytes of the files that an object store has, where they are known. A name that is not in the record is a problem
    too. Raises StorageError where an object store does not answer any more, or that directory has no room.
    """
    unique = list(dict.fromkeys(names))
    if storage.local_root is not None:
        yield storage, dict(_damaged_files(storage, record, unique, quick=quick))
        return
    found = _present(storage, record, unique) if sizes is None else sizes
    if quick:
        yield storage, dict(_wrong_sizes(storage, record, unique, found))
        return
    with tempfile.TemporaryDirectory(prefix="draftcache-") as directory:
        damaged = copy_committed(storage, record, unique, found, Path(directory))
        yield LocalCopy(Path(directory), storage), damaged


def _present(storage: Storage, record: Record, names: list[str]) -> dict[str, int]:
    """Return the bytes of the files that are there, by name."""

    def look(name: str) -> int | None:
        try:
            return require_size(storage, record, name)
        except ShardDamagedError:
            return storage.size(name)

    sizes = zip(names, ask_side_by_side(storage, look, names), strict=True)
    return {name: size for name, size in sizes if size is not None}


def _wrong_sizes(
    storage: Storage, record: Record, names: Iterable[str], sizes: Mapping[str, int]
) -> Iterator[tuple[str, str]]:
    """Yield the name and the problem of each file that is missing or of another size."""
    for name in names:
        try:
            check_size(storage, record, name, sizes.get(name))
        except ShardDamagedError as exc:
            yield name, str(exc)


def _damaged_files(storage: Storage, record: Record, names: Iterable[str], *, quick: bool) -> Iterator[tuple[str, str]]:
    """Yield the name and the problem of each file of a disk that is not as committed."""
    for name in names:
        try:
            require_size(storage, record, name)
            if not quick:
                check_hash(storage, record, name, hash_blocks(_blocks(storage, name)))
        except DraftcacheError as exc:
            yield name, str(exc)


def _blocks(storage: Storage, name: str) -> Iterator[Buffer]:
    """Yield a file's bytes in blocks of 4 MiB, each of which overwrites the one before."""
    file = storage.open(name)
    try:
        buffer = np.empty(min(_READ_BYTES, file.size), np.uint8)
        for offset in range(0, file.size, _READ_BYTES):
            block = buffer[: min(_READ_BYTES, file.size - offset)]
            file.read_into(offset, [block.data])
            yield block.data
    finally:
        file.close()
