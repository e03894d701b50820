"""Checks one shard for verify: its commit record, the files' sizes and hashes, the index, and the stored values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftcache.store.common.errors import DraftcacheError, ShardDamagedError, StoreError
from draftcache.store.common.files import Buffer, hash_blocks
from draftcache.store.format.array_spec import COUNT_FIELD, FIRST_FIELD
from draftcache.store.format.commits import Record, record_name, require_shard, require_size, shard_name
from draftcache.store.format.index import INDEX_NAME, read_shard_index
from draftcache.store.format.manifest import StoreManifest
from draftcache.store.reader import StoreReader
from draftcache.store.row_checks import check_conversation
from draftcache.store.storage.base import Location, Storage, open_storage

_READ_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One file or record that is not as it was committed."""

    name: str
    """Name of the file or record, relative to the store."""
    problem: str
    """What was expected and what was found."""
    shard: int | None = None
    """Number of the shard; None for a file beside the shards."""
    conversations: tuple[dict[str, Any], ...] = ()
    """split, dataset_index and content_hash of each conversation that is affected."""


@dataclass(frozen=True, kw_only=True)
class ShardReport:
    """What the checks of one shard found."""

    number: int
    record: Record | None
    """The commit record, or None where it can't be read or belongs to another shard or store."""
    damages: list[Damage]


def check_shard(location: Location, number: int, *, quick: bool) -> ShardReport:
    """Check one committed shard. With `quick`, only its commit record and the files' sizes are checked."""
    storage = open_storage(location)
    manifest = StoreManifest.load(storage)
    name = record_name(shard_name(number))
    try:
        record = require_shard(storage, number, manifest.hash)
    except StoreError as exc:
        damages = [Damage(name=name, problem=str(exc), shard=number)]
        return ShardReport(number=number, record=None, damages=damages)
    damaged = dict(damaged_files(storage, record, quick=quick))
    damages = []
    touched: dict[str, list[dict[str, Any]]] = {}
    if not quick:
        damages, touched = _check_rows(storage, manifest, number, record)
    affected = {item["content_hash"]: item for items in touched.values() for item in items}
    damages = [
        Damage(
            name=file,
            problem=problem,
            shard=number,
            conversations=tuple(touched.get(_array_of(record, file), affected.values())),
        )
        for file, problem in damaged.items()
    ] + damages
    return ShardReport(number=number, record=record, damages=damages)


def _array_of(record: Record, file: str) -> str:
    """Return the name of the array that a file of a zarr shard holds."""
    return file.removeprefix(f"{record['directory']}/").split("/")[0]


def damaged_files(storage: Storage, record: Record, *, quick: bool) -> Iterator[tuple[str, str]]:
    """Yield the name and the problem of each file of a commit record that is not as committed.

    Every file's size is checked and, unless `quick`, its xxh3-128.
    """
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


def _check_rows(
    storage: Storage, manifest: StoreManifest, number: int, record: Record
) -> tuple[list[Damage], dict[str, list[dict[str, Any]]]]:
    """Read every conversation. Returns the damages of values, and by array the conversations that can't be read."""
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
    for conversation, row in enumerate(index):
        about = describe_conversation(manifest, row)
        arrays: dict[str, NDArray[Any]] = {}
        for name in reader.specs:
            try:
                arrays |= reader.read(conversation, [name], decode=False).arrays
            except DraftcacheError:  # the file's hash reports the damage too; this tells which conversations it affects
                touched.setdefault(name, []).append(about)
        if len(arrays) < len(reader.specs):
            continue
        item = reader.decode(replace(reader.read(conversation, []), arrays=arrays))
        damages += [
            Damage(name=record["directory"], problem=problem, shard=number, conversations=(about,))
            for problem in check_conversation(item, manifest)
        ]
    reader.close()
    return damages, touched


def _index_problems(index: NDArray[Any], record: Record, number: int) -> list[str]:
    """Return what is wrong with a shard's index rows: their number, or the slices of the shard's arrays."""
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
    """Return which conversation of the prepared dataset an index row is about: split, dataset_index, content_hash."""
    return {
        "split": manifest.splits[int(row["split"])],
        "dataset_index": int(row["dataset_index"]),
        "content_hash": row["content_hash"].tobytes().hex(),
    }
