"""Reading a store: committed shards only, by conversation, any subset of arrays and rows."""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from draftcache.store.common.errors import InputError, ShardDamagedError, StoreError
from draftcache.store.common.files import hash_file
from draftcache.store.format.commits import (
    Record,
    committed_shards,
    read_committed,
    read_record,
    require_record,
    require_size,
    shard_name,
)
from draftcache.store.format.index import INDEX_NAME, INDEX_RECORD, join_indexes, load_index
from draftcache.store.format.manifest import StoreManifest
from draftcache.store.format.rows import rows_in_reach
from draftcache.store.format.schema import (
    COUNT_FIELD,
    ROWS_AXIS,
    TEACHER_AXIS,
    TOKENS_AXIS,
    Conversation,
    tap_name,
)
from draftcache.store.format.vocab_map import VocabMap
from draftcache.store.layouts.tar_shards import TarShard
from draftcache.store.layouts.zarr_reader import ZarrShard
from draftcache.store.storage.base import Location, Storage, open_storage

FROZEN_NAME = "frozen.safetensors"
VOCAB_MAP_NAME = "vocab_map.safetensors"

_OPEN_SHARDS = 16
_REMOTE_READS = 16  # arrays that are fetched at once from an object store


class Shard(Protocol):
    """What a shard's form must offer to a reader: zarr groups and tar files do."""

    def read(self, row: np.void, name: str, first: int, count: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Rows `first .. first+count` of one conversation's slice of an array. Raises ShardDamagedError."""

    def close(self) -> None:
        """Let go of the files."""


_FORMATS: dict[str, type[ZarrShard] | type[TarShard]] = {"zarr": ZarrShard, "webdataset": TarShard}


def top_level_names(manifest: StoreManifest) -> tuple[str, ...]:
    """Files that a store has beside its shards, each with a commit record of its own: frozen weights first."""
    return (FROZEN_NAME, *(vocab.map_name for vocab in manifest.teacher_form.vocabularies))


@dataclass(frozen=True)
class StoreFiles:
    """Top-level files that a trainer needs besides the shards, on a local disk."""

    frozen: Path
    """safetensors: embed_tokens [V, H], norm [H], lm_head [D, H] (the draft vocabulary's rows of the head), and
    lm_head_<D> for each further draft vocabulary."""
    vocab_map: Path
    more_vocab_maps: dict[int, Path]
    """By size, of the further draft vocabularies."""


class StoreReader:
    """Random access to the conversations of a store, on a disk or in an object store.

    A file's size is checked against its commit record when it is first touched, and every chunk's crc32c when it is
    read, so a missing or damaged shard is an error and never reads as zeros.
    """

    def __init__(self, location: Location, *, allow_partial: bool = False) -> None:
        """Open the store. `allow_partial` reads what is committed of a store whose capture has not finished."""
        storage = open_storage(location)
        self._begin(storage, StoreManifest.load(storage))
        self.index = self._load_index(allow_partial)

    @classmethod
    def of_shard(cls, storage: Storage, manifest: StoreManifest, index: NDArray[Any]) -> Self:
        """A reader of one shard's conversations, whatever else the store holds."""
        reader = cls.__new__(cls)
        reader._begin(storage, manifest)
        reader.index = index
        return reader

    def another(self) -> Self:
        """A reader of the same conversations with open files of its own, for another thread."""
        return type(self).of_shard(self.storage, self.manifest, self.index)

    def _begin(self, storage: Storage, manifest: StoreManifest) -> None:
        self.storage, self.manifest = storage, manifest
        self.location = storage.describe()
        self.codec = manifest.codec
        self.specs = manifest.array_specs()
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        self._copies: tempfile.TemporaryDirectory[str] | None = None

    def _load_index(self, allow_partial: bool) -> NDArray[Any]:
        record = read_record(self.storage, INDEX_RECORD)
        if record is not None:
            return load_index(read_committed(self.storage, record, INDEX_NAME), self.storage.describe(INDEX_NAME))
        shards = committed_shards(self.storage)
        if not allow_partial:
            raise StoreError(
                f"{self.location}: expected a finished store of {self.manifest.shards} shards, found {len(shards)} "
                "committed; rerun the capture command to finish it"
            )
        return join_indexes(self.storage, list(self.records()))

    def __len__(self) -> int:
        return int(self.index.shape[0])

    def records(self) -> Iterator[Record]:
        """Commit records of the shards, in order of their numbers."""
        for shard in committed_shards(self.storage):
            yield require_record(self.storage, shard_name(shard))

    @cached_property
    def files(self) -> StoreFiles:
        """Frozen weights and vocabulary maps, their xxh3-128 checked; copied here from an object store."""
        return StoreFiles(
            frozen=self._local_file(FROZEN_NAME),
            vocab_map=self._local_file(VOCAB_MAP_NAME),
            more_vocab_maps={
                vocab.size: self._local_file(vocab.map_name) for vocab in self.manifest.teacher_form.vocabularies[1:]
            },
        )

    def _local_file(self, name: str) -> Path:
        record = read_record(self.storage, Path(name).stem)
        if record is None:
            raise StoreError(
                f"{self.location}: expected {name} with its commit record, found none; rerun capture to finish it"
            )
        require_size(self.storage, record, name)
        if self.storage.local_root is not None:
            path = self.storage.local_root / name
        else:
            self._copies = self._copies or tempfile.TemporaryDirectory(prefix="draftcache-")
            path = Path(self._copies.name) / name
            path.write_bytes(self.storage.read(name))
        expected, found = record["files"][name]["xxh3_128"], hash_file(path)
        if found != expected:
            raise ShardDamagedError(f"{self.storage.describe(name)}: expected xxh3-128 {expected}, found {found}")
        return path

    def vocab_map(self, size: int = 0) -> VocabMap:
        """A draft-vocabulary map that the store was captured with, its hash checked against the manifest.

        `size` 0 is the main one's. Raises InputError naming the sizes that exist.
        """
        vocab = self.manifest.teacher_form.choose(size)
        path = self.files.more_vocab_maps.get(vocab.size, self.files.vocab_map)
        loaded = VocabMap.load(path)
        if loaded.hash != vocab.hash:
            raise StoreError(f"{path}: expected vocabulary {vocab.hash}, found {loaded.hash}")
        return loaded

    def members(self, split: str) -> NDArray[np.int64]:
        """Numbers of the split's conversations, in the prepared dataset's order. Raises InputError."""
        if split not in self.manifest.splits:
            raise InputError(
                f"{self.location}: expected one of the splits {list(self.manifest.splits)}, found {split!r}"
            )
        found = np.flatnonzero(self.index["split"] == self.manifest.splits.index(split))
        return found[np.argsort(self.index["dataset_index"][found], kind="stable")]

    def _shard(self, shard: int) -> Shard:
        if shard in self._shards:
            self._shards.move_to_end(shard)
            return self._shards[shard]
        record = require_record(self.storage, shard_name(shard))
        if record["manifest_hash"] != self.manifest.hash:
            raise ShardDamagedError(
                f"{self.storage.describe(record['directory'])}: expected a shard of manifest {self.manifest.hash}, "
                f"found one of {record['manifest_hash']}; it was copied from another store"
            )
        self._shards[shard] = _FORMATS[self.manifest.layout](self.storage, record, self.specs)
        if len(self._shards) > _OPEN_SHARDS:
            self._shards.popitem(last=False)[1].close()
        return self._shards[shard]

    def read(
        self,
        number: int,
        names: Iterable[str] | None = None,
        *,
        tokens: tuple[int, int] | None = None,
        window: int | None = None,
        decode: bool = True,
        out: Mapping[str, NDArray[Any]] | None = None,
    ) -> Conversation:
        """Read conversation `number` of `index`: all its arrays, or only those named, and of them:

        - `tokens` (a, b): token arrays at a .. b-1, rows and teacher positions in that range only;
        - `window` W: only rows in reach of a start row in that range, `t <= s < t + W`, also those before a.

        `decode` False gives taps as the arrays that the codec made of them, to be decoded where they are used.
        `out` holds memory for arrays by name, at least as long as what is read: results are views of it.
        Raises InputError for a range or window that the store does not hold, ShardDamagedError.
        """
        row = self.index[number]
        shard = self._shard(int(row["shard"]))
        wanted = self._expand(names)
        stored = [part for parts in wanted.values() for part in parts]
        picks = self._picks(shard, row, {self.specs[name].axis for name in stored}, tokens, window)
        given = out or {}

        def fetch(name: str) -> NDArray[Any]:
            return self._take(shard, row, name, picks[self.specs[name].axis], given.get(name))

        if self.storage.local_root is None:
            with ThreadPoolExecutor(_REMOTE_READS) as pool:
                found = dict(zip(stored, pool.map(fetch, stored), strict=True))
        else:
            found = {name: fetch(name) for name in stored}
        item = Conversation(
            content_hash=row["content_hash"].tobytes().hex(),
            split=int(row["split"]),
            dataset_index=int(row["dataset_index"]),
            arrays=found,
        )
        return self.decode(item, out=given) if decode else item

    def decode(self, item: Conversation, *, out: Mapping[str, NDArray[Any]] | None = None) -> Conversation:
        """The same conversation with states in the place of the parts that hold them, into `out` where it is given."""
        arrays, given = dict(item.arrays), out or {}
        for layer in self.manifest.layers:
            name, parts = tap_name(layer), tuple(self.codec.specs(layer))
            if parts != (name,) and all(part in arrays for part in parts):
                held = {part: arrays.pop(part) for part in parts}
                rows = held[parts[0]].shape[0]
                arrays[name] = self.codec.decode(layer, held, given[name][:rows] if name in given else None)
        return replace(item, arrays=arrays)

    def _expand(self, names: Iterable[str] | None) -> dict[str, tuple[str, ...]]:
        """Stored arrays behind each asked name: a tap's name stands for the parts that hold it."""
        parts = {tap_name(layer): tuple(self.codec.specs(layer)) for layer in self.manifest.layers}
        if names is None:
            held = {part for group in parts.values() for part in group}
            return parts | {name: (name,) for name in self.specs if name not in held}
        asked = list(names)
        unknown = [name for name in asked if name not in parts and name not in self.specs]
        if unknown:
            raise InputError(f"{self.location}: expected arrays among {[*parts, *self.specs]}, found {unknown}")
        return {name: parts.get(name, (name,)) for name in asked}

    def _picks(
        self, shard: Shard, row: np.void, axes: set[str], tokens: tuple[int, int] | None, window: int | None
    ) -> dict[str, NDArray[np.int64] | slice]:
        """Which rows of the conversation's slice to read, per axis."""
        picks: dict[str, NDArray[np.int64] | slice] = {
            axis: slice(0, int(row[COUNT_FIELD[axis]])) for axis in (TOKENS_AXIS, ROWS_AXIS, TEACHER_AXIS)
        }
        if tokens is None and window is None:
            return picks
        length = int(row["tokens"])
        first, last = tokens or (0, length)
        if not 0 <= first <= last <= length:
            raise InputError(f"{self.location}: expected a token range inside 0 .. {length}, found {first} .. {last}")
        picks[TOKENS_AXIS] = slice(first, last)
        if TEACHER_AXIS in axes:
            positions = shard.read(row, "teacher_positions", 0, int(row["teacher_rows"]))
            picks[TEACHER_AXIS] = slice(*(int(edge) for edge in np.searchsorted(positions, (first, last))))
        if ROWS_AXIS in axes:
            positions = shard.read(row, "positions", 0, int(row["rows"]))
            if window is None:
                picks[ROWS_AXIS] = slice(*(int(edge) for edge in np.searchsorted(positions, (first, last))))
            else:
                picks[ROWS_AXIS] = self._reach(shard, row, positions, (first, last), window)
        return picks

    def _reach(
        self, shard: Shard, row: np.void, positions: NDArray[Any], tokens: tuple[int, int], window: int
    ) -> NDArray[np.int64]:
        kept = self.manifest.window
        if kept is not None and window > kept:
            raise InputError(
                f"{self.location}: expected a window of at most {kept}, found {window}; rows beyond it were not stored"
            )
        loss_mask = shard.read(row, "loss_mask", 0, int(row["tokens"])).astype(np.bool_)
        return np.searchsorted(positions, rows_in_reach(loss_mask, window, tokens))

    def _take(
        self, shard: Shard, row: np.void, name: str, pick: NDArray[np.int64] | slice, out: NDArray[Any] | None
    ) -> NDArray[Any]:
        if isinstance(pick, slice):
            count = pick.stop - pick.start
            return shard.read(row, name, pick.start, count, None if out is None else out[:count])
        spec = self.specs[name]
        rows = np.empty((len(pick), *spec.inner), spec.stored_dtype) if out is None else out[: len(pick)]
        # Rows whose gap is less than a chunk are read by one call: the chunk between them is read anyway.
        for group in np.split(np.arange(len(pick)), np.flatnonzero(np.diff(pick) > spec.chunk_rows) + 1):
            if not group.size:
                continue
            low, high = int(pick[group[0]]), int(pick[group[-1]]) + 1
            target = rows[group[0] : group[-1] + 1]
            if high - low == len(group):
                shard.read(row, name, low, high - low, target)
            else:
                target[:] = shard.read(row, name, low, high - low)[pick[group] - low]
        return rows

    def bytes_on_disk(self) -> int:
        """Bytes of all committed shard files, from the commit records."""
        return sum(item["bytes"] for record in self.records() for item in record["files"].values())

    def close(self) -> None:
        """Let go of open files and of copies from an object store."""
        while self._shards:
            self._shards.popitem()[1].close()
        if self._copies is not None:
            self._copies.cleanup()
            self._copies = None
