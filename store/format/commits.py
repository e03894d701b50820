"""Commit records: a file of a store counts only once `commit/<name>.json` says its size and xxh3-128.

A shard is written under a temporary name, made durable and renamed. An object store has no rename: there each attempt
uploads under a name that no other attempt uses. Then the shard's record is written, once, by a call that fails where a
record is already there. A reader that starts from the records therefore never sees half a shard, whenever a writer was
killed, and of two writers of one shard one wins whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from draftcache.store.common.errors import ShardDamagedError, StoreError, StoreNotFoundError
from draftcache.store.common.files import hash_bytes
from draftcache.store.common.sealed_json import seal, unseal
from draftcache.store.format.array_spec import FIRST_FIELD
from draftcache.store.storage.asking import ask_again, ask_side_by_side
from draftcache.store.storage.base import RangeFile, Storage

COMMIT_DIRECTORY = "commit"
_SHARD_RECORD = re.compile(COMMIT_DIRECTORY + r"/([0-9]{5}|[1-9][0-9]{5,9})\.json")
SHARDS_DIRECTORY = "shards"

_REPAIR = "run `draftcache repair` on the store, then the capture command again"

Record = dict[str, Any]
"""A commit record. `files` is {name in the store: {"bytes", "xxh3_128"}}. The record of a shard also has `directory`,
`lengths` (by axis), `manifest_hash` and the values that capture recorded."""

SETTINGS_HASH = "settings_hash"
"""Field of the records of the frozen weights and the vocabulary maps: `StoreManifest.settings_hash`."""
_SHARD_FIELDS = {"directory": str, "lengths": dict, "conversations": int, "manifest_hash": str}
"""Fields of a shard's record that readers depend on, and their types."""


class RecordMissingError(ShardDamagedError):
    """There is no commit record where there must be one."""


def shard_name(shard: int) -> str:
    """Return a shard's number as five digits, as its commit record's and its directory's names have it."""
    return f"{shard:05d}"


def shard_number(name: str) -> int | None:
    """The shard that a file or directory below `shards/` belongs to by its name; None where the name is no shard's.

    A shard's directory is called by its five digits, with `-` and an attempt's name behind them in an object store, or
    where a rival had the plain name on a disk.
    """
    number = name.partition("/")[2].partition("/")[0].partition("-")[0]
    return int(number) if re.fullmatch("[0-9]{5,10}", number) else None


def record_name(name: str) -> str:
    """Return the file name, in the store, of the commit record `name`: a shard's name or a top-level file's stem."""
    return f"{COMMIT_DIRECTORY}/{name}.json"


def write_record(storage: Storage, name: str, record: Record) -> bool:
    """Publish files that are already durable. Returns False where another writer's record was there first."""
    return storage.create(record_name(name), seal(record))


def read_record(storage: Storage, name: str) -> Record | None:
    """Return the commit record, or None where nothing of this name was committed.

    A record that is there is asked for again before it counts as damaged. Raises StoreError where it is damaged or is
    none.
    """
    return ask_again(storage, partial(_look_up, storage, name))


def read_records(storage: Storage, names: Iterable[str]) -> Iterator[Record | None]:
    """Yield `read_record` of every name, in their order. An object store is asked for many of them at a time."""
    return ask_side_by_side(storage, partial(read_record, storage), names)


def _look_up(storage: Storage, name: str) -> Record | None:
    """Return what one look finds of a commit record. Raises StoreError."""
    path = record_name(name)
    try:
        data = storage.read(path)
    except StoreNotFoundError:
        return None
    record = unseal(data, storage.describe(path))
    files = record.get("files")
    if not isinstance(files, dict) or not all(_is_entry(entry) for entry in files.values()):
        raise StoreError(
            f"{storage.describe(path)}: expected a commit record with a `files` table of sizes and hashes, found none; "
            "run `draftcache repair` on the store, then the capture command again"
        )
    return record


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("xxh3_128"), str)


def require_record(storage: Storage, name: str) -> Record:
    """Return the commit record of a name that was listed as committed. Raises RecordMissingError where it is gone."""
    return ask_again(storage, partial(_require_once, storage, name))


def _require_once(storage: Storage, name: str) -> Record:
    record = _look_up(storage, name)
    if record is None:
        raise RecordMissingError(
            f"{storage.describe(record_name(name))}: expected a commit record, found none; "
            "rerun the capture command to make the shard again"
        )
    return record


def require_shard(storage: Storage, shard: int, manifest_hash: str) -> Record:
    """Return the commit record of a shard of this store, after a check that it is this shard's and this store's.

    The record names the shard's directory, whose name begins with the shard's number, and the manifest's hash: a record
    that took another one's place does not fit. Raises StoreError where the record is damaged, RecordMissingError where
    it is gone, and ShardDamagedError where it belongs elsewhere.
    """

    def look() -> Record:
        record = _require_once(storage, shard_name(shard))
        _require_identity(storage, shard, manifest_hash, record)
        return record

    return ask_again(storage, look)


def require_shards(storage: Storage, shards: Iterable[int], manifest_hash: str) -> Iterator[Record]:
    """Yield `require_shard` of every shard, in their order. An object store is asked for many records at a time."""
    return ask_side_by_side(storage, lambda shard: require_shard(storage, shard, manifest_hash), shards)


def find_shards(
    storage: Storage, shards: Iterable[int], manifest_hash: str, *, expected: bool
) -> Iterator[Record | None]:
    """Yield `require_shard` of every shard, in their order, or None where a shard has no commit record.

    `expected` says that they all must have one, so that a missing one is asked for again.
    """

    def look(shard: int) -> Record | None:
        if not expected and read_record(storage, shard_name(shard)) is None:
            return None
        try:
            return require_shard(storage, shard, manifest_hash)
        except RecordMissingError:
            return None

    return ask_side_by_side(storage, look, shards)


def _require_identity(storage: Storage, shard: int, manifest_hash: str, record: Record) -> None:
    """Raise ShardDamagedError unless a record is that of this shard of this store."""
    where = storage.describe(record_name(shard_name(shard)))
    for name, kind in _SHARD_FIELDS.items():
        if not isinstance(record.get(name), kind):
            raise ShardDamagedError(
                f"{where}: expected a shard's record with the field {name!r}, found {record.get(name)!r}; {_REPAIR}"
            )
    if not all(isinstance(record["lengths"].get(axis), int) for axis in FIRST_FIELD):
        raise ShardDamagedError(
            f"{where}: expected lengths of {list(FIRST_FIELD)}, found {record['lengths']}; {_REPAIR}"
        )
    require_manifest(storage, shard_name(shard), record, manifest_hash)
    directory = record["directory"]
    if shard_number(directory) != shard or directory.count("/") != 1 or not directory.startswith(SHARDS_DIRECTORY):
        raise ShardDamagedError(
            f"{where}: expected the record of {SHARDS_DIRECTORY}/{shard_name(shard)}, found that of {directory}; "
            f"records were exchanged: put the right one back, or {_REPAIR}"
        )
    astray = [name for name in record["files"] if not name.startswith(f"{directory}/") or ".." in name.split("/")]
    if astray:
        raise ShardDamagedError(f"{where}: expected files below {directory}, found {astray[0]}; {_REPAIR}")


def require_manifest(
    storage: Storage, name: str, record: Record, expected: str, *, field: str = "manifest_hash"
) -> None:
    """Raise ShardDamagedError where the record `name` says that it belongs to a store of another manifest.

    It says so in `field`: the records of shards and of the index hold the manifest's hash, those of the other files
    `SETTINGS_HASH`. Records of top-level files that an older draftcache wrote say nothing, and pass.
    """
    found = record.get(field, expected)
    if found != expected:
        raise ShardDamagedError(
            f"{storage.describe(record_name(name))}: expected a record of manifest {expected}, found one of "
            f"{found}; it was copied from another store: put the right files and records back, or {_REPAIR}"
        )


def committed_shards(storage: Storage) -> list[int]:
    """Return the numbers of the shards that have a commit record, ascending. Other files beside them are passed by."""
    found = (_SHARD_RECORD.fullmatch(name) for name in storage.list(COMMIT_DIRECTORY))
    return sorted(int(match[1]) for match in found if match)


def require_size(storage: Storage, record: Record, name: str) -> int:
    """Return the bytes of a committed file. Raises ShardDamagedError where it is missing or of another size."""
    return ask_again(storage, lambda: check_size(storage, record, name, storage.size(name)))


def check_size(storage: Storage, record: Record, name: str, found: int | None) -> int:
    """Return the bytes of a committed file, of which `found` were found, or no file at all where that is None.

    Raises ShardDamagedError where these are not the record's.
    """
    if name not in record["files"]:
        raise ShardDamagedError(
            f"{storage.describe(name)}: expected its size and hash in the commit record, found no entry; {_REPAIR}"
        )
    expected = int(record["files"][name]["bytes"])
    if found is None:
        raise ShardDamagedError(
            f"{storage.describe(name)}: expected {expected} bytes, found no file. Nothing reads as zeros in its place: "
            f"{_REPAIR}"
        )
    if found != expected:
        raise ShardDamagedError(
            f"{storage.describe(name)}: expected {expected} bytes, found {found}; the file was cut or changed: "
            f"{_REPAIR}"
        )
    return expected


def check_hash(storage: Storage, record: Record, name: str, found: str) -> None:
    """Raise ShardDamagedError where the xxh3-128 of a committed file, which was `found`, is not the record's."""
    expected = record["files"][name]["xxh3_128"]
    if found != expected:
        raise ShardDamagedError(f"{storage.describe(name)}: expected xxh3-128 {expected}, found {found}; {_REPAIR}")


def open_committed(storage: Storage, record: Record, name: str) -> RangeFile:
    """Open a committed file. Raises ShardDamagedError where it is missing or of another size."""

    def look() -> RangeFile:
        try:
            file = storage.open(name)
        except StoreNotFoundError:
            check_size(storage, record, name, None)
            raise
        try:
            check_size(storage, record, name, file.size)
        except ShardDamagedError:
            file.close()
            raise
        return file

    return ask_again(storage, look)


def read_committed(storage: Storage, record: Record, name: str) -> bytes:
    """Read a small committed file. Raises ShardDamagedError where its size or its xxh3-128 is not the record's."""

    def look() -> bytes:
        try:
            data = storage.read(name)
        except StoreNotFoundError:
            check_size(storage, record, name, None)
            raise
        check_size(storage, record, name, len(data))
        check_hash(storage, record, name, hash_bytes(data))
        return data

    return ask_again(storage, look)
