"""Checks one shard for verify: its commit record, the files' sizes and hashes, the index, and the stored values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftcache.store.common.errors import DraftcacheError, StoreError
from draftcache.store.file_checks import checked_files
from draftcache.store.format.array_spec import COUNT_FIELD, FIRST_FIELD
from draftcache.store.format.commits import Record, record_name, require_shard, shard_name
from draftcache.store.format.index import INDEX_NAME, read_shard_index
from draftcache.store.format.manifest import StoreManifest
from draftcache.store.known_shards import KnownShard, known_shards
from draftcache.store.layouts.registry import expected_files
from draftcache.store.layouts.tar_samples import read_tar
from draftcache.store.layouts.tar_shards import DATA_NAME
from draftcache.store.reader import StoreReader
from draftcache.store.row_checks import check_conversation
from draftcache.store.storage.base import Location, Storage, open_storage

REFUSED = (DraftcacheError, ValueError, LookupError, TypeError, RuntimeError, ArithmeticError, MemoryError)
"""What reading or judging damaged bytes may raise. Any of it is damage to report, never the end of the verification."""


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


def check_shard(location: Location, number: int, known: KnownShard | None = None, *, quick: bool) -> ShardReport:
    """Check one committed shard. With `quick`, only its commit record and the files' sizes are checked.

    `known` is what an object store was found to hold of the shard. Every byte of such a shard is fetched once, to a
    temporary directory, which needs room for it. Raises StorageError where an object store does not answer any more, or
    that directory has no room.
    """
    storage = open_storage(location)
    manifest = StoreManifest.load(storage) if known is None else known.manifest
    if known is None and storage.local_root is None:
        (known,) = known_shards(storage, manifest, [number], {})
    try:
        record = require_shard(storage, number, manifest.hash) if known is None else known.require_record()
    except StoreError as exc:
        damage = Damage(name=record_name(shard_name(number)), problem=str(exc), shard=number)
        return ShardReport(number=number, record=None, damages=[damage])
    needed = expected_files(manifest.layout, record, manifest.array_specs())
    sizes = None if known is None else known.sizes
    damages: list[Damage] = []
    unread: dict[str, _Unread] = {}
    with checked_files(storage, record, [*record["files"], *needed], quick=quick, sizes=sizes) as (held, damaged):
        if not quick:
            damages, unread = _check_rows(held, manifest, number, record)
        damages = [*_file_damages(record, number, damaged, unread), *damages]
        if not (quick or damages) and manifest.layout == "webdataset":
            damages = _stream_damages(held, manifest, number, record)
    return ShardReport(number=number, record=record, damages=damages)


@dataclass
class _Unread:
    """Why an array can't be read, and the conversations that this affects."""

    problem: str
    conversations: list[dict[str, Any]] = field(default_factory=list)


def _file_damages(record: Record, number: int, damaged: dict[str, str], unread: dict[str, _Unread]) -> Iterator[Damage]:
    """Yield the damaged files with the conversations that they affect, then the arrays that can't be read though none
    of their files is damaged: what reading refuses is damage, whatever the hashes say.
    """
    affected = {about["content_hash"]: about for found in unread.values() for about in found.conversations}
    explained = set()
    for file, problem in damaged.items():
        array = file.removeprefix(f"{record['directory']}/").split("/")[0]  # in a zarr shard; a tar file holds all
        explained |= {array} if array in unread else set(unread)
        touched = unread[array].conversations if array in unread else affected.values()
        yield Damage(name=file, problem=problem, shard=number, conversations=tuple(touched))
    for array, found in unread.items():
        if array not in explained:
            yield Damage(
                name=f"{record['directory']}/{array}",
                problem=f"expected an array that can be read, found {found.problem}",
                shard=number,
                conversations=tuple(found.conversations),
            )


def _check_rows(
    storage: Storage, manifest: StoreManifest, number: int, record: Record
) -> tuple[list[Damage], dict[str, _Unread]]:
    """Read every conversation. Returns the damages of values, and by array why it can't be read, where it can't."""
    try:
        index = read_shard_index(storage, record)
    except DraftcacheError as exc:
        return [Damage(name=f"{record['directory']}/{INDEX_NAME}", problem=str(exc), shard=number)], {}
    damages = [
        Damage(name=f"{record['directory']}/{INDEX_NAME}", problem=problem, shard=number)
        for problem in _index_problems(index, record, number, len(manifest.splits))
    ]
    unread: dict[str, _Unread] = {}
    if damages:
        return damages, unread
    reader = StoreReader.of_shard(storage, manifest, index, record)
    for conversation, row in enumerate(index):
        about = describe_conversation(manifest, row)
        arrays: dict[str, NDArray[Any]] = {}
        for name in reader.specs:
            try:
                arrays |= reader.read(conversation, [name], decode=False).arrays
            except REFUSED as exc:
                unread.setdefault(name, _Unread(brief(exc))).conversations.append(about)
        if len(arrays) < len(reader.specs):
            continue
        damages += [
            Damage(name=record["directory"], problem=problem, shard=number, conversations=(about,))
            for problem in _value_problems(reader, conversation, arrays)
        ]
    reader.close()
    return damages, unread


def _value_problems(reader: StoreReader, conversation: int, arrays: dict[str, NDArray[Any]]) -> list[str]:
    """Decode a conversation, whose stored arrays these are, and return what is wrong with its values."""
    try:
        item = reader.decode(replace(reader.read(conversation, []), arrays=arrays))
        return check_conversation(item, reader.manifest)
    except REFUSED as exc:
        return [f"expected values that can be decoded and checked, found {brief(exc)}"]


def _stream_damages(storage: Storage, manifest: StoreManifest, number: int, record: Record) -> list[Damage]:
    """Read a tar shard from front to back, as a stream does. Returns the damage where that is refused."""
    try:
        for _ in read_tar(storage, record, manifest.array_specs(), read_shard_index(storage, record)):
            pass
    except REFUSED as exc:
        return [Damage(name=f"{record['directory']}/{DATA_NAME}", problem=brief(exc), shard=number)]
    return []


def brief(exc: Exception) -> str:
    """Return an error's message, with its kind where it is not one of ours."""
    return str(exc) if isinstance(exc, DraftcacheError) else f"{type(exc).__name__}: {exc}"


def _index_problems(index: NDArray[Any], record: Record, number: int, splits: int) -> list[str]:
    """Return what is wrong with a shard's index rows: their number, splits, or the slices of the shard's arrays."""
    problems = []
    if ((index["split"] < 0) | (index["split"] >= splits)).any():
        problems.append(f"expected splits below {splits}, found {sorted(set(index['split'].tolist()))}")
    if len(index) != record["conversations"] or (index["shard"] != number).any():
        problems.append(f"expected {record['conversations']} conversations of shard {number}, found others")
    for axis, first in FIRST_FIELD.items():
        count = COUNT_FIELD[axis]
        ends = np.cumsum(index[count])
        if (index[count] < 0).any() or not np.array_equal(index[first], ends - index[count]):
            problems.append(f"expected the {axis} of conversations one after the other, found gaps or overlaps")
        elif (int(ends[-1]) if len(ends) else 0) != record["lengths"][axis]:
            problems.append(f"expected {record['lengths'][axis]} {axis}, found {int(index[count].sum())}")
    return problems


def describe_conversation(manifest: StoreManifest, row: np.void) -> dict[str, Any]:
    """Return which conversation of the prepared dataset an index row is about: split, dataset_index, content_hash."""
    return {
        "split": manifest.splits[int(row["split"])],
        "dataset_index": int(row["dataset_index"]),
        "content_hash": row["content_hash"].tobytes().hex(),
    }
