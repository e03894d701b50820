"""Training straight from tar shards, front to back: whole shards dealt to ranks and workers, every byte checked.

For people whose data lives in tar pipelines. What a stream can't do, and a store read at random (`StoreReader`) can:
single conversations by number, batches of like length, a resume inside an epoch without reading what was before.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

import numpy as np
from numcodecs import Zstd
from numpy.typing import NDArray

from draftcache.store.common.errors import ShardDamagedError, StreamingError
from draftcache.store.common.files import hash_bytes
from draftcache.store.format.commits import Record, require_size
from draftcache.store.format.manifest import StoreManifest
from draftcache.store.format.schema import ArraySpec, Conversation
from draftcache.store.layouts.tar_shards import DATA_NAME, member_suffix
from draftcache.store.reader import StoreReader
from draftcache.store.storage.base import Location, RangeFile

_MEMBER = re.compile(r"(?P<key>[0-9]{2,}-[0-9]{9,})\.(?P<suffix>json|[a-z0-9_]+\.npy(\.zst)?)")
_READ_AHEAD = 1 << 23
_LARGEST_JSON = 1 << 20
_ZSTD = Zstd(level=1)


@dataclass(frozen=True)
class Reader:
    """Which of all readers this is: worker `worker` of `workers` on rank `rank` of `world_size`."""

    rank: int = 0
    world_size: int = 1
    worker: int = 0
    workers: int = 1


class TarStream:
    """Batches of conversations of one epoch; every rank gets the same number of them.

    `uneven` "drop" leaves out what some ranks have more than others, "repeat" lets those that have less begin again.
    Shards go to ranks and workers by size; their order, and whether conversations are left out at a reader's start or
    end, is a pure function of (seed, epoch), so that no conversation is left out for good. Ranks and workers must all
    be given the same arguments but their own numbers.
    """

    def __init__(
        self,
        location: Location,
        *,
        split: str | None = None,
        reader: Reader | None = None,
        batch_size: int = 1,
        seed: int = 0,
        epoch: int = 0,
        uneven: str = "drop",
        skip_batches: int = 0,
        decode: bool = True,
    ) -> None:
        """Raises StreamingError for what can't be streamed: another layout, or fewer shards than ranks."""
        self._store = StoreReader(location)
        self._reader = reader or Reader()
        self._decode, self._batch_size, self._skip = decode, batch_size, skip_batches
        self._uneven = uneven
        manifest = self._store.manifest
        if manifest.layout != "webdataset":
            raise StreamingError(
                f"{self._store.location}: expected tar shards, found {manifest.layout}; read it with StoreReader, "
                "or run `draftcache convert --layout webdataset`"
            )
        if uneven not in ("drop", "repeat") or batch_size < 1 or skip_batches < 0:
            raise StreamingError(
                f"expected uneven drop or repeat, batch_size >= 1 and skip_batches >= 0, found {uneven!r}, "
                f"{batch_size} and {skip_batches}"
            )
        if split is not None and split not in manifest.splits:
            raise StreamingError(
                f"{self._store.location}: expected a split of {list(manifest.splits)}, found {split!r}"
            )
        self._records = [record for record in self._store.records() if self._wanted(record, split)]
        if len(self._records) < self._reader.world_size:
            raise StreamingError(
                f"{self._store.location}: expected at least {self._reader.world_size} shards, one for each rank, found "
                f"{len(self._records)}; make smaller ones with `draftcache convert --shard-tokens`"
            )
        self._dealt = self._deal(seed, epoch)
        self._share_out(seed, epoch)

    def _wanted(self, record: Record, split: str | None) -> bool:
        """Shards hold one split each."""
        if not record["conversations"]:
            return False
        index = self._store.index
        first = index[np.flatnonzero(index["shard"] == _number(record))[0]]
        return split is None or self._store.manifest.splits.index(split) == first["split"]

    def _deal(self, seed: int, epoch: int) -> list[list[list[Record]]]:
        """Per rank and worker its shards."""
        order = np.random.default_rng([seed, epoch]).permutation(len(self._records))
        shuffled = [self._records[int(number)] for number in order]
        ranks = _balanced(shuffled, self._reader.world_size)
        return [_balanced(shards, self._reader.workers) for shards in ranks]

    def _share_out(self, seed: int, epoch: int) -> None:
        """Batches of each worker, the ranks' sums equal, and how many conversations it passes over first."""
        size = self._batch_size
        counts = [[sum(record["conversations"] for record in shards) for shards in rank] for rank in self._dealt]
        batches = [[count // size for count in rank] for rank in counts]
        totals = [sum(rank) for rank in batches]
        self._total = min(totals) if self._uneven == "drop" else max(totals)
        if not self._total:
            raise StreamingError(
                f"{self._store.location}: expected at least {size} conversations for a worker of every rank, found "
                f"ranks of {[sum(rank) for rank in counts]}; lower the batch size"
            )
        mine = batches[self._reader.rank]
        if self._uneven == "drop":
            for _ in range(sum(mine) - self._total):
                mine[mine.index(max(mine))] -= 1
        else:
            busy = [worker for worker, count in enumerate(counts[self._reader.rank]) if count]
            for number in range(self._total - sum(mine)):
                mine[busy[number % len(busy)]] += 1
        self._quota = mine[self._reader.worker]
        surplus = counts[self._reader.rank][self._reader.worker] - self._quota * size
        draw = np.random.default_rng([seed, epoch, self._reader.rank, self._reader.worker])
        self._start = int(draw.integers(surplus + 1)) if surplus > 0 else 0
        held = sum(sum(rank) for rank in counts)
        self.dropped = held - self._total * size * self._reader.world_size if self._uneven == "drop" else 0

    def __len__(self) -> int:
        """Batches of this rank, its workers' together; the same for every rank."""
        return int(self._total)

    def __getitem__(self, number: int) -> Conversation:
        raise StreamingError(
            f"{self._store.location}: a stream has no conversation {number}: read single ones with StoreReader"
        )

    def __iter__(self) -> Iterator[list[Conversation]]:
        shards = self._dealt[self._reader.rank][self._reader.worker]
        batch: list[Conversation] = []
        given = 0
        passed = 0
        while given < self._quota:
            for item in self._conversations(shards):
                if passed < self._start:
                    passed += 1
                    continue
                batch.append(item)
                if len(batch) == self._batch_size:
                    given += 1
                    if given > self._skip:
                        yield [self._store.decode(one) if self._decode else one for one in batch]
                    batch = []
                    if given == self._quota:
                        return

    def _conversations(self, shards: list[Record]) -> Iterator[Conversation]:
        for record in shards:
            yield from read_tar(self._store, record)


def _number(record: Record) -> int:
    directory: str = record["directory"]
    return int(directory.split("/")[1][:5])


def _balanced(records: list[Record], parts: int) -> list[list[Record]]:
    """Records in `parts`, the largest first to whoever has the fewest conversations so far; each keeps their order."""
    dealt: list[list[int]] = [[] for _ in range(parts)]
    sizes = [0] * parts
    for number in sorted(range(len(records)), key=lambda number: -int(records[number]["conversations"])):
        least = sizes.index(min(sizes))
        dealt[least].append(number)
        sizes[least] += records[number]["conversations"]
    return [[records[number] for number in sorted(part)] for part in dealt]


def read_tar(store: StoreReader, record: Record) -> Iterator[Conversation]:
    """Conversations of one tar shard in order, as they are stored. Raises ShardDamagedError.

    Members must be regular files of the names, order, sizes and hashes that a sample has, and nothing else.
    """
    name = f"{record['directory']}/{DATA_NAME}"
    require_size(store.storage, record, name)
    where = store.storage.describe(name)
    file = store.storage.open(name)
    found = 0
    try:
        with tarfile.open(fileobj=cast("IO[bytes]", _Stream(file)), mode="r|", bufsize=_READ_AHEAD) as tar:
            members = _checked_members(tar, where)
            for key, suffix, data in members:
                if suffix != "json":
                    raise ShardDamagedError(f"{where}: expected {key}.json first in its sample, found {key}.{suffix}")
                yield _sample(store.manifest, where, key, data, members)
                found += 1
    except (tarfile.TarError, EOFError) as exc:
        raise ShardDamagedError(f"{where}: expected a whole tar file, could not read on ({exc})") from exc
    finally:
        file.close()
    if found != record["conversations"]:
        raise ShardDamagedError(f"{where}: expected {record['conversations']} samples, found {found}")


def _checked_members(tar: tarfile.TarFile, where: str) -> Iterator[tuple[str, str, bytes]]:
    for info in tar:
        match = _MEMBER.fullmatch(info.name)
        if match is None or not info.isreg() or info.issparse():
            raise ShardDamagedError(
                f"{where}: refused member {info.name!r}: expected a regular file named KEY.json or KEY.ARRAY.npy"
            )
        if match["suffix"] == "json" and info.size > _LARGEST_JSON:
            raise ShardDamagedError(f"{where}: refused member {info.name!r}: expected at most 1 MiB of JSON")
        extracted = tar.extractfile(info)
        assert extracted is not None, "a regular file has content"
        data = extracted.read()
        if len(data) != info.size:
            raise ShardDamagedError(
                f"{where}: expected {info.size} bytes of {info.name}, found {len(data)}; it was cut"
            )
        yield match["key"], match["suffix"], data


def _sample(
    manifest: StoreManifest, where: str, key: str, about_json: bytes, members: Iterator[tuple[str, str, bytes]]
) -> Conversation:
    try:
        about = json.loads(about_json)
        hashes = {suffix: str(value) for suffix, value in about["xxh3_128"].items()}
        identity = str(about["content_hash"]), int(about["split"]), int(about["dataset_index"])
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ShardDamagedError(f"{where}: {key}.json: expected a sample's description, found something else") from exc
    arrays: dict[str, NDArray[Any]] = {}
    for name, spec in manifest.array_specs().items():
        expected = member_suffix(name, spec)
        found_key, suffix, data = next(members, ("", "nothing", b""))
        if (found_key, suffix) != (key, expected):
            raise ShardDamagedError(f"{where}: expected member {key}.{expected} next, found {found_key}.{suffix}")
        if hash_bytes(data) != hashes.get(suffix):
            raise ShardDamagedError(f"{where}: {key}.{suffix}: expected xxh3-128 {hashes.get(suffix)}, found another")
        arrays[name] = _array(data, spec, f"{where}: {key}.{suffix}")
    return Conversation(content_hash=identity[0], split=identity[1], dataset_index=identity[2], arrays=arrays)


def _array(data: bytes, spec: ArraySpec, where: str) -> NDArray[Any]:
    """A member's array. Never unpickles: object arrays are refused by their dtype."""
    try:
        buffer = io.BytesIO(_ZSTD.decode(data) if spec.compress else data)
        array = np.lib.format.read_array(buffer, allow_pickle=False)
    except (ValueError, RuntimeError, EOFError) as exc:
        raise ShardDamagedError(f"{where}: expected a .npy array, could not read it ({exc})") from exc
    if array.dtype != spec.stored_dtype or array.shape[1:] != spec.inner:
        raise ShardDamagedError(
            f"{where}: expected {spec.dtype} rows of {spec.inner}, found {array.dtype} {array.shape}"
        )
    return np.asarray(array)


class _Stream(io.RawIOBase):
    """A committed file as tarfile reads one: forward only."""

    def __init__(self, file: RangeFile) -> None:
        self._file, self._offset = file, 0

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes."""
        count = min(size if size >= 0 else self._file.size, self._file.size - self._offset)
        data = bytearray(count)
        self._file.read_into(self._offset, [memoryview(data)])
        self._offset += count
        return bytes(data)
