"""What an object store holds of many shards, asked for at once: their commit records and the sizes of their files."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from draftcache.store.common.errors import StorageError, StoreError
from draftcache.store.format.commits import Record, RecordMissingError, record_name, require_shard, shard_name
from draftcache.store.format.manifest import StoreManifest
from draftcache.store.storage.asking import ask_again, ask_side_by_side
from draftcache.store.storage.base import Storage


@dataclass(frozen=True, kw_only=True)
class KnownShard:
    """One committed shard as an object store holds it."""

    number: int
    manifest: StoreManifest
    record: Record | None
    """The commit record, or None where it can't be used."""
    problem: str = ""
    """Why the record can't be used."""
    sizes: dict[str, int] = field(default_factory=dict)
    """The bytes of each file that the record names and that is there."""

    def require_record(self) -> Record:
        """Return the commit record. Raises StoreError, which says why, where it can't be used."""
        if self.record is None:
            raise StoreError(self.problem)
        return self.record

    @property
    def suspect(self) -> list[str]:
        """The names of the files that are missing or not of the record's size."""
        files = {} if self.record is None else self.record["files"]
        return [name for name, entry in files.items() if self.sizes.get(name) != entry["bytes"]]


def recorded_shards(storage: Storage, numbers: Iterable[int]) -> set[int]:
    """Return which of these shards, which all must be committed, have a commit record, be it a damaged one."""

    def require(number: int) -> None:
        if storage.size(record_name(shard_name(number))) is None:
            raise RecordMissingError(f"{storage.describe()}: expected a commit record of shard {number}, found none")

    def look(number: int) -> int | None:
        try:
            ask_again(storage, partial(require, number))
        except RecordMissingError:
            return None
        return number

    return {number for number in ask_side_by_side(storage, look, numbers) if number is not None}


def known_shards(
    storage: Storage, manifest: StoreManifest, numbers: Iterable[int], listed: dict[str, int]
) -> list[KnownShard]:
    """Return the records of shards and their files' sizes, without a question per shard after the other.

    `listed` holds the bytes of the files below `shards/` by name, as `Storage.list_sizes` gives them. A list may be out
    of date or cut short: a file that it does not name with the record's size is asked for by name, and once more after
    each of `Storage.pauses`; then the record is read again, because it may be the one that is out of date. Raises
    StorageError.
    """
    shards = list(ask_side_by_side(storage, partial(_read, storage, manifest), numbers))
    shards = [_with_sizes(shard, listed) for shard in shards]
    shards = _ask_for_sizes(storage, shards)
    for pause in storage.pauses:
        if not any(shard.suspect for shard in shards):
            break
        time.sleep(pause)
        shards = list(ask_side_by_side(storage, partial(_renewed, storage, listed), shards))
        shards = _ask_for_sizes(storage, shards)
    return shards


def _renewed(storage: Storage, listed: dict[str, int], shard: KnownShard) -> KnownShard:
    """Return a shard with suspect files as its commit record says now, where that has changed."""
    if not shard.suspect:
        return shard
    found = _read(storage, shard.manifest, shard.number)
    return shard if found.record == shard.record else _with_sizes(found, listed)


def _read(storage: Storage, manifest: StoreManifest, number: int) -> KnownShard:
    try:
        record = require_shard(storage, number, manifest.hash)
    except StorageError:
        raise
    except StoreError as exc:
        return KnownShard(number=number, manifest=manifest, record=None, problem=str(exc))
    return KnownShard(number=number, manifest=manifest, record=record)


def _with_sizes(shard: KnownShard, listed: dict[str, int]) -> KnownShard:
    files = {} if shard.record is None else shard.record["files"]
    return replace(shard, sizes={name: listed[name] for name in files if name in listed})


def _ask_for_sizes(storage: Storage, shards: list[KnownShard]) -> list[KnownShard]:
    """Return the shards with the sizes of their suspect files asked for by name."""
    names = [name for shard in shards for name in shard.suspect]
    answers = dict(zip(names, ask_side_by_side(storage, storage.size, names), strict=True))

    def told(shard: KnownShard) -> KnownShard:
        sizes = {**shard.sizes, **{name: answers[name] for name in shard.suspect}}
        return replace(shard, sizes={name: size for name, size in sizes.items() if size is not None})

    return [told(shard) if shard.suspect else shard for shard in shards]
