"""Is a store what its commit records say? Sizes, hashes, checksums, indexes against arrays, and the stored values."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftcache.store.common.errors import DraftcacheError, ShardDamagedError, StoreError
from draftcache.store.common.files import Buffer, hash_blocks
from draftcache.store.format.commits import (
    SHARDS_DIRECTORY,
    Record,
    committed_shards,
    read_committed,
    read_record,
    record_name,
    require_record,
    require_size,
    shard_name,
)
from draftcache.store.format.index import INDEX_NAME, INDEX_RECORD, load_index, read_shard_index
from draftcache.store.format.manifest import StoreManifest
from draftcache.store.format.schema import COUNT_FIELD, FIRST_FIELD
from draftcache.store.format.vocab_map import VocabMap
from draftcache.store.reader import StoreReader, top_level_names
from draftcache.store.row_checks import check_conversation
from draftcache.store.storage.base import Location, Storage, open_storage

_READ_BYTES = 1 << 22
_PROCESSES_FROM = 8  # shards; fewer are not worth starting processes for


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is not as it was committed."""

    name: str
    """File or record, relative to the store."""
    problem: str
    shard: int | None = None
    conversations: tuple[dict[str, Any], ...] = ()
    """split, dataset_index and content_hash of each conversation that it touches."""


@dataclass(kw_only=True)
class VerifyReport:
    """What was looked at and what was found."""

    location: str
    quick: bool
    shards: int = 0
    """Shards that the manifest plans."""
    committed: int = 0
    conversations: int = 0
    bytes: int = 0
    indexed: bool = False
    """Whether the store's index is committed: the last thing that a capture writes."""
    damages: list[Damage] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)
    """Files below shards/ that no commit record names; they are no part of the store."""

    @property
    def finished(self) -> bool:
        """Whether every planned shard is committed, and the index of them all."""
        return self.committed == self.shards and self.indexed

    @property
    def damaged_shards(self) -> list[int]:
        """Numbers of the shards that something is wrong with, ascending."""
        return sorted({item.shard for item in self.damages if item.shard is not None})

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"finished": self.finished, "damaged_shards": self.damaged_shards}


def verify_store(
    location: Location,
    *,
    quick: bool = False,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> VerifyReport:
    """Check everything; `quick` only that every record can be read and every file has its size.

    `progress` is called with the bytes of each shard that is done. Raises StoreNotFoundError or StoreVersionError
    where there is no store that could be verified; a damaged manifest is part of the report.
    """
    storage = open_storage(location)
    report = VerifyReport(location=storage.describe(), quick=quick)
    try:
        manifest = StoreManifest.load(storage)
    except StoreError as exc:
        if type(exc) is not StoreError:  # not found, or of another version: nothing here can be judged
            raise
        report.damages.append(Damage(name="manifest.json", problem=str(exc)))
        return report
    numbers = committed_shards(storage)
    report.shards, report.committed = manifest.shards, len(numbers)
    report.damages += _check_top_level(storage, manifest, quick)
    report.indexed = storage.size(record_name(INDEX_RECORD)) is not None
    if report.indexed:
        # The index is written once every shard is committed: one without a record has lost it.
        report.damages += [
            Damage(name=record_name(shard_name(number)), problem="expected a commit record, found none", shard=number)
            for number in sorted(set(range(manifest.shards)) - set(numbers))
        ]
    jobs = [(str(location), number, quick) for number in numbers]
    records: dict[int, Record] = {}
    for number, record, conversations, damages in _run(jobs, workers):
        report.damages += damages
        if record is not None:
            records[number] = record
            report.conversations += conversations
            size = sum(item["bytes"] for item in record["files"].values())
            report.bytes += size
            if progress is not None:
                progress(size)
    if report.finished and not report.damages and not quick:
        report.damages += _check_store_index(storage, records)
    named = {name for record in records.values() for name in record["files"]}
    report.strays = [
        name
        for name in storage.list(SHARDS_DIRECTORY)
        if name not in named and int(name.split("/")[1][:5]) not in report.damaged_shards
    ]
    return report


_Found = tuple[int, Record | None, int, list[Damage]]


def _run(jobs: list[tuple[str, int, bool]], workers: int | None) -> Iterable[_Found]:
    processes = min(workers or os.cpu_count() or 1, len(jobs))
    if processes < 2 or len(jobs) < _PROCESSES_FROM:
        yield from map(_check_shard, jobs)
        return
    # spawn: a forked child would inherit the threads' locks of whatever the caller had running
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_check_shard, jobs, chunksize=max(1, min(16, len(jobs) // (4 * processes))))


def _check_shard(job: tuple[str, int, bool]) -> _Found:
    location, number, quick = job
    storage = open_storage(location)
    manifest = StoreManifest.load(storage)
    name = record_name(shard_name(number))
    try:
        record = require_record(storage, shard_name(number))
        if record["manifest_hash"] != manifest.hash:
            raise StoreError(
                f"{storage.describe(name)}: expected manifest {manifest.hash}, found {record['manifest_hash']}; "
                "it was copied from another store"
            )
    except StoreError as exc:
        return number, None, 0, [Damage(name=name, problem=str(exc), shard=number)]
    damaged = dict(_damaged_files(storage, record, quick))
    damages: list[Damage] = []
    touched: dict[str, list[dict[str, Any]]] = {}
    if not quick:
        damages, touched = _check_rows(storage, manifest, number, record)
    anywhere = {item["content_hash"]: item for items in touched.values() for item in items}
    damages = [
        Damage(
            name=file,
            problem=problem,
            shard=number,
            conversations=tuple(touched.get(_array_of(record, file), anywhere.values())),
        )
        for file, problem in damaged.items()
    ] + damages
    return number, record, int(record["conversations"]), damages


def _array_of(record: Record, file: str) -> str:
    return file.removeprefix(f"{record['directory']}/").split("/")[0]


def _damaged_files(storage: Storage, record: Record, quick: bool) -> Iterator[tuple[str, str]]:
    for name, expected in record["files"].items():
        try:
            require_size(storage, record, name)
            if not quick and (found := hash_blocks(_blocks(storage, name))) != expected["xxh3_128"]:
                raise ShardDamagedError(
                    f"{storage.describe(name)}: expected xxh3-128 {expected['xxh3_128']}, found {found}"
                )
        except DraftcacheError as exc:
            yield name, str(exc)


def _blocks(storage: Storage, name: str) -> Iterator[Buffer]:
    file = storage.open(name)
    try:
        buffer = np.empty(min(_READ_BYTES, file.size), np.uint8)
        for offset in range(0, file.size, _READ_BYTES):
            block = buffer[: min(_READ_BYTES, file.size - offset)]
            file.read_into(offset, [block.data])
            yield block.data
    finally:
        file.close()


def _check_top_level(storage: Storage, manifest: StoreManifest, quick: bool) -> list[Damage]:
    """Frozen weights, vocabulary maps, and the store's index where one is committed."""
    damages = []
    maps = {vocab.map_name: vocab.hash for vocab in manifest.teacher_form.vocabularies}
    for name in (*top_level_names(manifest), INDEX_NAME):
        stem = Path(name).stem
        try:
            record = read_record(storage, stem)
            if record is None and name == INDEX_NAME:
                continue  # the store is not finished
            if record is None:
                raise StoreError(f"{storage.describe(record_name(stem))}: expected a commit record, found none")
            for damaged, problem in _damaged_files(storage, record, quick):
                damages.append(Damage(name=damaged, problem=problem))
            if name in maps and not quick and storage.local_root is not None:
                found = VocabMap.load(storage.local_root / name).hash
                if found != maps[name]:
                    raise StoreError(f"{name}: expected vocabulary {maps[name]}, found {found}")
        except DraftcacheError as exc:
            damages.append(Damage(name=name if stem != INDEX_RECORD else INDEX_NAME, problem=str(exc)))
    return damages


def _check_store_index(storage: Storage, records: dict[int, Record]) -> list[Damage]:
    """The store's index must be its shards' indexes, one after the other."""
    record = require_record(storage, INDEX_RECORD)
    index = load_index(read_committed(storage, record, INDEX_NAME), storage.describe(INDEX_NAME))
    parts = [read_shard_index(storage, records[number]) for number in sorted(records)]
    if parts and not np.array_equal(index, np.concatenate(parts)):
        return [Damage(name=INDEX_NAME, problem="expected the rows of the shards' indexes in order, found others")]
    return []


def _check_rows(
    storage: Storage, manifest: StoreManifest, number: int, record: Record
) -> tuple[list[Damage], dict[str, list[dict[str, Any]]]]:
    """Read every conversation. Returns damages of values, and by array which conversations can't be read."""
    try:
        index = read_shard_index(storage, record)
    except DraftcacheError as exc:
        return [Damage(name=f"{record['directory']}/{INDEX_NAME}", problem=str(exc), shard=number)], {}
    damages = [
        Damage(name=f"{record['directory']}/{INDEX_NAME}", problem=problem, shard=number)
        for problem in _index_problems(index, record, number)
    ]
    touched: dict[str, list[dict[str, Any]]] = {}
    if damages:
        return damages, touched
    reader = StoreReader.of_shard(storage, manifest, index)
    for place, row in enumerate(index):
        about = describe_conversation(manifest, row)
        arrays: dict[str, NDArray[Any]] = {}
        for name in reader.specs:
            try:
                arrays |= reader.read(place, [name], decode=False).arrays
            except DraftcacheError:  # the file's hash says so too; this tells which conversations lie there
                touched.setdefault(name, []).append(about)
        if len(arrays) < len(reader.specs):
            continue
        item = reader.decode(replace(reader.read(place, []), arrays=arrays))
        damages += [
            Damage(name=record["directory"], problem=problem, shard=number, conversations=(about,))
            for problem in check_conversation(item, manifest)
        ]
    reader.close()
    return damages, touched


def _index_problems(index: NDArray[Any], record: Record, number: int) -> list[str]:
    problems = []
    if len(index) != record["conversations"] or (index["shard"] != number).any():
        problems.append(f"expected {record['conversations']} conversations of shard {number}, found others")
    for axis, first in FIRST_FIELD.items():
        count = COUNT_FIELD[axis]
        ends = np.cumsum(index[count])
        if (index[count] < 0).any() or not np.array_equal(index[first], ends - index[count]):
            problems.append(f"expected the {axis} of conversations one after the other, found gaps or overlaps")
        elif (int(ends[-1]) if len(ends) else 0) != record["lengths"][axis]:
            problems.append(f"expected {record['lengths'][axis]} {axis}, found {int(ends[-1])}")
    return problems


def describe_conversation(manifest: StoreManifest, row: np.void) -> dict[str, Any]:
    """Which conversation an index row is, in the prepared dataset's terms."""
    return {
        "split": manifest.splits[int(row["split"])],
        "dataset_index": int(row["dataset_index"]),
        "content_hash": row["content_hash"].tobytes().hex(),
    }
