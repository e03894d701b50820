"""Commit records: a file of a store counts only once `commit/<name>.json` says its size and xxh3-128.

A shard is written under a temporary name, made durable and renamed. An object store has no rename: there each attempt
uploads under a name that no other attempt uses. Then the shard's record is written, once, by a call that fails where a
record is already there. A reader that starts from the records therefore never sees half a shard, whenever a writer was
killed, and of two writers of one shard one wins whole.
"""

from __future__ import annotations

from typing import Any

from draftcache.store.common.errors import ShardDamagedError, StoreError
from draftcache.store.common.files import hash_bytes
from draftcache.store.common.sealed_json import seal, unseal
from draftcache.store.storage.base import Storage

COMMIT_DIRECTORY = "commit"
SHARDS_DIRECTORY = "shards"

Record = dict[str, Any]
"""A commit record. `files` is {name in the store: {"bytes", "xxh3_128"}}. The record of a shard also has `directory`,
`lengths` (by axis) and the values that capture recorded."""


def shard_name(shard: int) -> str:
    """Return a shard's number as five digits, as its commit record's and its directory's names have it."""
    return f"{shard:05d}"


def shard_number(name: str) -> int | None:
    """The shard that a file or directory below `shards/` belongs to by its name; None where the name is no shard's.

    A shard's directory is called by its five digits, in an object store with `-` and the attempt's name behind them.
    """
    number = name.split("/")[1].partition("-")[0]
    return int(number) if number.isdecimal() and number.isascii() else None


def record_name(name: str) -> str:
    """Return the file name, in the store, of the commit record `name`: a shard's name or a top-level file's stem."""
    return f"{COMMIT_DIRECTORY}/{name}.json"


def write_record(storage: Storage, name: str, record: Record) -> bool:
    """Publish files that are already durable. Returns False where another writer's record was there first."""
    return storage.create(record_name(name), seal(record))


def read_record(storage: Storage, name: str) -> Record | None:
    """Return the commit record, or None where nothing of this name was committed.

    Raises StoreError where the record is damaged or is none.
    """
    path = record_name(name)
    if storage.size(path) is None:
        return None
    record = unseal(storage.read(path), storage.describe(path))
    if not isinstance(record.get("files"), dict):
        raise StoreError(f"{storage.describe(path)}: expected a commit record with a `files` table, found none")
    return record


def require_record(storage: Storage, name: str) -> Record:
    """Return the commit record of a name that was listed as committed. Raises ShardDamagedError where it is gone."""
    record = read_record(storage, name)
    if record is None:
        raise ShardDamagedError(
            f"{storage.describe(record_name(name))}: expected a commit record, found none; "
            "rerun the capture command to make the shard again"
        )
    return record


def committed_shards(storage: Storage) -> list[int]:
    """Return the numbers of the shards that have a commit record, ascending."""
    stems = [name.rpartition("/")[2].removesuffix(".json") for name in storage.list(COMMIT_DIRECTORY)]
    return sorted(int(stem) for stem in stems if stem.isdigit())


def require_size(storage: Storage, record: Record, name: str) -> int:
    """Return the bytes of a committed file. Raises ShardDamagedError where it is missing or of another size."""
    expected = record["files"].get(name, {}).get("bytes")
    found = storage.size(name)
    if found is None:
        raise ShardDamagedError(
            f"{storage.describe(name)}: expected {expected} bytes, found no file. Nothing reads as zeros in its place: "
            "run `draftcache repair` on the store, then the capture command again"
        )
    if found != expected:
        raise ShardDamagedError(
            f"{storage.describe(name)}: expected {expected} bytes, found {found}; the file was cut or changed"
        )
    return found


def read_committed(storage: Storage, record: Record, name: str) -> bytes:
    """Read a small committed file. Raises ShardDamagedError where its size or its xxh3-128 is not the record's."""
    require_size(storage, record, name)
    data = storage.read(name)
    expected, found = record["files"][name]["xxh3_128"], hash_bytes(data)
    if found != expected:
        raise ShardDamagedError(f"{storage.describe(name)}: expected xxh3-128 {expected}, found {found}")
    return data
