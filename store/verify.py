"""Checks whether a store is what its manifest and commit records say, and returns a report of the damage.

`shard_checks` checks one shard; here are the store's other files, and the shards side by side in several processes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from draftcache.store.common.errors import StorageError, StoreError
from draftcache.store.file_checks import checked_files
from draftcache.store.format.commits import (
    SETTINGS_HASH,
    SHARDS_DIRECTORY,
    Record,
    committed_shards,
    read_committed,
    record_name,
    require_manifest,
    require_record,
    shard_name,
    shard_number,
)
from draftcache.store.format.frozen import FROZEN_NAME, require_frozen
from draftcache.store.format.index import INDEX_NAME, INDEX_RECORD, find_index_record, join_indexes, load_index
from draftcache.store.format.manifest import StoreManifest, top_level_names
from draftcache.store.format.vocab_map import VocabMap
from draftcache.store.known_shards import KnownShard, known_shards, recorded_shards
from draftcache.store.shard_checks import REFUSED, Damage, ShardReport, brief, check_shard
from draftcache.store.storage.base import Location, Storage, open_storage

_PROCESSES_FROM = 8
"""Shards from which on processes are started. Fewer are not worth the start."""


@dataclass(kw_only=True)
class VerifyReport:
    """What `verify_store` looked at and what it found."""

    location: str
    """Path or URL of the store."""
    quick: bool
    """Whether only records and sizes were checked."""
    shards: int = 0
    """Shards that the manifest plans."""
    committed: int = 0
    """Shards that have a commit record."""
    conversations: int = 0
    """Conversations of the shards whose records can be read."""
    bytes: int = 0
    """Bytes of those shards' files, as the records say."""
    indexed: bool = False
    """Whether the store's index is committed, which capture writes last."""
    damages: list[Damage] = field(default_factory=list)
    """Everything that is not as it was committed."""
    strays: list[str] = field(default_factory=list)
    """Files below shards/ that no commit record names. They are no part of the store."""

    @property
    def finished(self) -> bool:
        """Whether every planned shard is committed, and the whole store's index too."""
        return self.committed == self.shards and self.indexed

    @property
    def damaged_shards(self) -> list[int]:
        """Numbers of the damaged shards, ascending."""
        return sorted({item.shard for item in self.damages if item.shard is not None})

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self) | {"finished": self.finished, "damaged_shards": self.damaged_shards}


def verify_store(
    location: Location,
    *,
    quick: bool = False,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Check a store against its manifest and commit records, and return the report.

    Every file's size and xxh3-128 is checked, every index against its arrays, and every conversation's values. With
    `quick`, only that every record can be read and every file has its size. `workers` is the number of processes, by
    default one per core; stores of few shards are checked in this process. `progress` is called with the bytes of each
    shard that is done.

    All damage is part of the report, that of the manifest too. Raises StoreNotFoundError or StoreVersionError where
    there is no store that could be verified.
    """
    storage = open_storage(location)
    report = VerifyReport(location=storage.describe(), quick=quick)
    try:
        manifest = StoreManifest.load(storage)
    except StoreError as exc:
        if type(exc) is not StoreError:  # the store is not there, or of another version, and nothing can be judged
            raise
        report.damages.append(Damage(name="manifest.json", problem=str(exc)))
        return report
    report.shards = manifest.shards
    report.damages += _check_top_level(storage, manifest, quick)
    report.indexed = _is_indexed(storage)
    listed = storage.list_sizes(SHARDS_DIRECTORY) if storage.local_root is None else {}
    numbers = _committed(storage, manifest, report)
    records: dict[int, Record] = {}
    known = known_shards(storage, manifest, numbers, listed) if storage.local_root is None else [None] * len(numbers)
    for found in _check_shards(location, numbers, known, quick, workers):
        report.damages += found.damages
        if found.record is not None:
            records[found.number] = found.record
            report.conversations += int(found.record["conversations"])
            size = sum(item["bytes"] for item in found.record["files"].values())
            report.bytes += size
            if progress is not None:
                progress(size)
    if report.finished and not report.damages and not quick:
        report.damages += _check_store_index(storage, records)
    report.strays = _strays(listed or storage.list(SHARDS_DIRECTORY), records, report.damaged_shards)
    return report


def _committed(storage: Storage, manifest: StoreManifest, report: VerifyReport) -> list[int]:
    """Return the numbers of the shards to check, and report records that are missing or outside the manifest's plan.

    The index is written once every shard is committed, so a shard without a record has lost it. A list that came back
    short loses none: each shard that it leaves out is asked for by number.
    """
    listed = committed_shards(storage)
    inside = [number for number in listed if number < manifest.shards]
    report.damages += [_beyond_plan(number, manifest.shards) for number in listed if number >= manifest.shards]
    if report.indexed:
        unlisted = sorted(set(range(manifest.shards)) - set(inside))
        there = recorded_shards(storage, unlisted)
        report.damages += [_lost_record(number) for number in unlisted if number not in there]
        inside = sorted({*inside, *there})
    report.committed = len(inside)
    return inside


def _is_indexed(storage: Storage) -> bool:
    """Return whether the store's index is committed. A damaged record counts: `_check_top_level` reports it."""
    try:
        return find_index_record(storage) is not None
    except StorageError:
        raise
    except StoreError:
        return True


def _beyond_plan(number: int, shards: int) -> Damage:
    name = record_name(shard_name(number))
    return Damage(name=name, problem=f"expected records of shards below {shards}, found this one", shard=number)


def _lost_record(number: int) -> Damage:
    name = record_name(shard_name(number))
    return Damage(name=name, problem="expected a commit record, found none", shard=number)


def _strays(listed: Iterable[str], records: dict[int, Record], damaged_shards: list[int]) -> list[str]:
    """Return the listed files below shards/ that no record names, save those of damaged shards."""
    named = {name for record in records.values() for name in record["files"]}
    return [name for name in listed if name not in named and shard_number(name) not in damaged_shards]


def _check_shards(
    location: Location, numbers: list[int], known: Sequence[KnownShard | None], quick: bool, workers: int | None
) -> Iterable[ShardReport]:
    """Check the shards, in their order, side by side where there are enough of them and something is left to read.

    `known` is what an object store was found to hold of each of them.
    """
    check = partial(check_shard, str(location), quick=quick)
    processes = min(workers or os.cpu_count() or 1, len(numbers))
    if processes < 2 or len(numbers) < _PROCESSES_FROM or (quick and known[0] is not None):
        yield from map(check, numbers, known)
        return
    # Processes are spawned, because a forked child would inherit the locks of whatever threads the caller has running.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(check, numbers, known, chunksize=max(1, min(16, len(numbers) // (4 * processes))))


def _check_top_level(storage: Storage, manifest: StoreManifest, quick: bool) -> list[Damage]:
    """Check the frozen weights, the vocabulary maps, and the store's index where one is committed."""
    damages = []
    for name in (*top_level_names(manifest), INDEX_NAME):
        found = _check_top_file(storage, manifest, name, quick)
        for pause in storage.pauses if found else ():  # the record itself may be one of a moment ago
            time.sleep(pause)
            found = found and _check_top_file(storage, manifest, name, quick)
        damages += found
    return damages


def _check_top_file(storage: Storage, manifest: StoreManifest, name: str, quick: bool) -> list[Damage]:
    stem = Path(name).stem
    try:
        record = find_index_record(storage) if name == INDEX_NAME else require_record(storage, stem)
        if record is None:
            return []  # the store is not finished
        if name == INDEX_NAME:
            require_manifest(storage, stem, record, manifest.hash)
        else:
            require_manifest(storage, stem, record, manifest.settings_hash, field=SETTINGS_HASH)
        with checked_files(storage, record, [*record["files"], name], quick=quick) as (held, damaged):
            if not quick and held.local_root is not None and name not in damaged:
                _require_readable(held.local_root / name, manifest)
            return [Damage(name=file, problem=problem) for file, problem in damaged.items()]
    except REFUSED as exc:
        if isinstance(exc, StorageError) and storage.local_root is None:
            raise  # an object store that does not answer is not damaged
        return [Damage(name=name, problem=brief(exc))]


def _require_readable(path: Path, manifest: StoreManifest) -> None:
    """Raise an error unless a top-level file is what its name says, whatever its hash."""
    vocabularies = manifest.teacher_form.vocabularies
    maps = {vocab.map_name: vocab.hash for vocab in vocabularies}
    if path.name in maps and (found := VocabMap.load(path).hash) != maps[path.name]:
        raise StoreError(f"{path}: expected vocabulary {maps[path.name]}, found {found}")
    if path.name == FROZEN_NAME:
        require_frozen(path, manifest.hidden_size, {vocab.head: vocab.size for vocab in vocabularies})
    if path.name == INDEX_NAME:
        load_index(path.read_bytes(), str(path))


def _check_store_index(storage: Storage, records: dict[int, Record]) -> list[Damage]:
    """Check that the store's index is its shards' indexes, one after the other."""
    record = require_record(storage, INDEX_RECORD)
    index = load_index(read_committed(storage, record, INDEX_NAME), storage.describe(INDEX_NAME))
    if not np.array_equal(index, join_indexes(storage, [records[number] for number in sorted(records)])):
        return [Damage(name=INDEX_NAME, problem="expected the rows of the shards' indexes in order, found others")]
    return []
