"""index.npy: one row per conversation, in every shard and, once all shards are committed, for the whole store."""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import partial
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftcache.store.common.errors import ShardDamagedError
from draftcache.store.common.files import Buffer, hash_bytes
from draftcache.store.format.commits import (
    COMMIT_DIRECTORY,
    SHARDS_DIRECTORY,
    Record,
    committed_shards,
    find_shards,
    read_committed,
    read_record,
    read_records,
    record_name,
    require_manifest,
    require_record,
    require_shards,
    shard_name,
    write_record,
)
from draftcache.store.format.manifest import StoreManifest
from draftcache.store.format.schema import INDEX_DTYPE
from draftcache.store.storage.asking import ask_again, ask_side_by_side
from draftcache.store.storage.base import Storage

_NO_NPY = (OSError, ValueError, EOFError, SyntaxError, TokenError, TypeError, LookupError, MemoryError, Warning)
"""What numpy raises for bytes that are no .npy file: it reads the header as a Python expression."""
INDEX_NAME = "index.npy"
"""Name of the file, in a shard's directory and in the store's root."""
INDEX_RECORD = "index"
"""Name of the commit record of the whole store's index."""


def npy_bytes(array: NDArray[Any]) -> bytes:
    """Return the bytes of a .npy file that holds the array."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def load_npy(data: Buffer, where: str) -> NDArray[Any]:
    """Return the array that the bytes of a .npy file hold. Nothing is unpickled: object arrays are refused.

    Raises ShardDamagedError, which names `where`, for bytes that are no such file.
    """
    try:
        return np.asarray(np.lib.format.read_array(io.BytesIO(data), allow_pickle=False))
    except _NO_NPY as exc:
        raise ShardDamagedError(
            f"{where}: expected a .npy array, could not read it ({exc}); run `draftcache repair` on the store, then "
            "the capture command again"
        ) from exc


def load_index(data: bytes, where: str) -> NDArray[Any]:
    """Return the index rows, of `INDEX_DTYPE`, that the bytes of an index.npy hold.

    Raises ShardDamagedError, which names `where`, for bytes that are no such file.
    """
    index = load_npy(data, where)
    if index.dtype != INDEX_DTYPE or index.ndim != 1:
        raise ShardDamagedError(f"{where}: expected index fields {INDEX_DTYPE.names}, found {index.dtype.names}")
    return index


def read_shard_index(storage: Storage, record: Record) -> NDArray[Any]:
    """Return the index rows of one committed shard. Raises ShardDamagedError where they are not as committed."""
    name = f"{record['directory']}/{INDEX_NAME}"
    return load_index(read_committed(storage, record, name), storage.describe(name))


def join_indexes(storage: Storage, records: Iterable[Record]) -> NDArray[Any]:
    """Return the index rows of several shards, one shard after the other. Raises ShardDamagedError."""
    parts = list(ask_side_by_side(storage, partial(read_shard_index, storage), records))
    return np.concatenate(parts) if parts else np.empty(0, INDEX_DTYPE)


def indexed_records(storage: Storage, manifest: StoreManifest, index: NDArray[Any]) -> list[Record]:
    """Return the commit records of all shards of a finished store, after counting them against manifest and index.

    They are asked for by number, so that a listing that came back short leaves none out. Raises ShardDamagedError,
    which names the shards and counts their conversations, where records are missing; and where a record holds another
    number of conversations than the index has of its shard.
    """
    numbers = index["shard"]
    if ((numbers < 0) | (numbers >= manifest.shards)).any():
        raise ShardDamagedError(
            f"{storage.describe(INDEX_NAME)}: expected rows of the manifest's {manifest.shards} shards, found one of "
            f"shard {numbers.max()}; run `draftcache repair` on the store"
        )
    counts = np.bincount(numbers, minlength=manifest.shards).tolist()
    found = list(find_shards(storage, range(manifest.shards), manifest.hash, expected=True))
    lost = [shard for shard, record in enumerate(found) if record is None]
    if lost:
        raise ShardDamagedError(
            f"{storage.describe(COMMIT_DIRECTORY)}: expected the commit records of all {manifest.shards} shards of a "
            f"finished store, found none of {[shard_name(shard) for shard in lost]}, which hold "
            f"{sum(counts[shard] for shard in lost)} of its {len(index)} conversations; run `draftcache repair` on the "
            "store, then the capture command again"
        )
    records = [record for record in found if record is not None]
    for shard, record in enumerate(records):
        if record["conversations"] != counts[shard]:
            raise ShardDamagedError(
                f"{storage.describe(INDEX_NAME)}: expected {record['conversations']} conversations of shard "
                f"{shard_name(shard)}, as its commit record says, found {counts[shard]}; run `draftcache repair` on "
                "the store"
            )
    return records


def find_index_record(storage: Storage) -> Record | None:
    """Return the commit record of the whole store's index, or None where the store is not finished.

    Raises StoreError where it is damaged, and RecordMissingError where a list names it and yet it can't be read.
    """
    record = read_record(storage, INDEX_RECORD)
    if record is None and storage.pauses and record_name(INDEX_RECORD) in storage.list(COMMIT_DIRECTORY):
        return require_record(storage, INDEX_RECORD)
    return record


def read_store_index(storage: Storage, manifest: StoreManifest) -> NDArray[Any] | None:
    """Return the rows of the whole store's index, or None where the store is not finished.

    Raises StoreError where its commit record is damaged, and ShardDamagedError where the index is not as committed.
    """

    def look() -> NDArray[Any] | None:
        record = find_index_record(storage)
        if record is None:
            return None
        require_manifest(storage, INDEX_RECORD, record, manifest.hash)
        return load_index(read_committed(storage, record, INDEX_NAME), storage.describe(INDEX_NAME))

    return ask_again(storage, look)  # the record itself may be one of a moment ago


def write_store_index(storage: Storage, manifest: StoreManifest) -> bool:
    """Write the whole store's index.npy, unless it is there. Returns False where shards are still missing."""
    unlisted = sorted(set(range(manifest.shards)) - set(committed_shards(storage)))
    # A list may come back short: what it leaves out is missing only if there is no record of its name either.
    if any(record is None for record in read_records(storage, map(shard_name, unlisted))):
        return False
    if read_record(storage, INDEX_RECORD) is None:
        records = list(require_shards(storage, range(manifest.shards), manifest.hash))
        data = npy_bytes(join_indexes(storage, records))
        _remove_orphans(storage, {record["directory"] for record in records})
        storage.put(INDEX_NAME, data)
        entry = {"bytes": len(data), "xxh3_128": hash_bytes(data)}
        write_record(storage, INDEX_RECORD, {"files": {INDEX_NAME: entry}, "manifest_hash": manifest.hash})
    return True


def _remove_orphans(storage: Storage, kept: set[str]) -> None:
    """Remove uploads that lost to another writer's, or whose writer died.

    A store on a local disk has none, because there a shard is renamed into its directory.
    """
    if storage.local_root is not None:
        return
    orphans = [name for name in storage.list(SHARDS_DIRECTORY) if "/".join(name.split("/")[:2]) not in kept]
    for _ in ask_side_by_side(storage, storage.delete, orphans):
        pass
