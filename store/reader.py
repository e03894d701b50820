"""Reads a store's committed shards at random: by conversation, in any subset of arrays and rows."""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from draftcache.store.common.errors import InputError, ShardDamagedError, StoreError
from draftcache.store.common.files import hash_file
from draftcache.store.format.array_spec import tap_name
from draftcache.store.format.commits import (
    SETTINGS_HASH,
    Record,
    committed_shards,
    read_committed,
    read_record,
    require_manifest,
    require_shard,
    require_size,
)
from draftcache.store.format.frozen import FROZEN_NAME
from draftcache.store.format.index import INDEX_NAME, INDEX_RECORD, indexed_records, join_indexes, load_index
from draftcache.store.format.manifest import StoreManifest
from draftcache.store.format.schema import Conversation
from draftcache.store.format.vocab_map import VocabMap
from draftcache.store.layouts.registry import SHARD_READERS, ShardReader
from draftcache.store.row_selection import read_rows, select_rows
from draftcache.store.storage.base import Location, Storage, open_storage

_OPEN_SHARDS = 16
_REMOTE_READS = 16  # arrays that are fetched at once from an object store


@dataclass(frozen=True)
class StoreFiles:
    """Paths, on a local disk, of the top-level files that a trainer needs besides the shards."""

    frozen: Path
    """The verifier's frozen weights; `format.frozen` lists the tensors."""
    vocab_map: Path
    """The map of the main draft vocabulary."""
    more_vocab_maps: dict[int, Path]
    """The maps of the further draft vocabularies, by size."""


class StoreReader:
    """Random access to the conversations of a store, on a disk or in an object store.

    A file's size is checked against its commit record when it is first touched, and every chunk's crc32c when it is
    read, so a missing or damaged shard is an error and never reads as zeros. `index` holds one row per conversation, of
    `schema.INDEX_DTYPE`; a conversation's number is its row there. `manifest`, `codec` and `specs` (the description of
    every stored array, by name) tell what the store holds, and `finished` whether its capture has ended. At most 16
    shards are open at a time. A reader belongs to one thread; `another` makes one for another thread.
    """

    def __init__(self, location: Location, *, allow_partial: bool = False) -> None:
        """Open the store at a path or URL.

        With `allow_partial`, the committed shards of a store whose capture has not finished are read; without it,
        StoreError is raised for such a store. Raises StoreNotFoundError where there is no store, StoreVersionError for
        another version of the layout, StoreError for a damaged manifest or record, and ShardDamagedError for a damaged
        index.
        """
        storage = open_storage(location)
        self._begin(storage, StoreManifest.load(storage))
        self.index = self._load_index(allow_partial)

    @classmethod
    def of_shard(
        cls, storage: Storage, manifest: StoreManifest, index: NDArray[Any], record: Record | None = None
    ) -> Self:
        """Return a reader of the conversations of `index` only, whatever else the store holds.

        `index` holds rows of `schema.INDEX_DTYPE`, such as those of one shard. `record` is that shard's commit record
        where it is not written yet.
        """
        reader = cls.__new__(cls)
        reader._begin(storage, manifest, record)
        reader.index = index
        return reader

    def another(self) -> Self:
        """Return a reader of the same conversations that shares no open file with this one, for another thread."""
        reader = type(self).of_shard(self.storage, self.manifest, self.index, self._uncommitted)
        reader.finished = self.finished
        return reader

    def _begin(self, storage: Storage, manifest: StoreManifest, record: Record | None = None) -> None:
        self.storage, self.manifest = storage, manifest
        self.location = storage.describe()
        self.codec = manifest.codec
        self.specs = manifest.array_specs()
        self._shards: OrderedDict[int, ShardReader] = OrderedDict()
        self._copies: tempfile.TemporaryDirectory[str] | None = None
        self._uncommitted = record
        self.finished = False

    def _load_index(self, allow_partial: bool) -> NDArray[Any]:
        record = read_record(self.storage, INDEX_RECORD)
        if record is not None:
            self.finished = True
            require_manifest(self.storage, INDEX_RECORD, record, self.manifest.hash)
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
        """Yield the commit records of the shards, in order of their numbers.

        Those of a finished store are counted against its manifest and its index first. Raises ShardDamagedError where
        one is missing or belongs elsewhere, and StoreError for a damaged one.
        """
        if self.finished:
            yield from indexed_records(self.storage, self.manifest, self.index)
            return
        for shard in committed_shards(self.storage):
            yield require_shard(self.storage, shard, self.manifest.hash)

    @cached_property
    def files(self) -> StoreFiles:
        """The frozen weights and the vocabulary maps, after a check of their xxh3-128.

        Files of an object store are copied to a temporary directory, which `close` removes. Raises StoreError where a
        file has no commit record, and ShardDamagedError where it differs from its record.
        """
        return StoreFiles(
            frozen=self._local_file(FROZEN_NAME),
            vocab_map=self._local_file(self.manifest.teacher_form.main.map_name),
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
        settings = self.manifest.settings_hash
        require_manifest(self.storage, Path(name).stem, record, settings, field=SETTINGS_HASH)
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
        """Return the map of the declared draft vocabulary of `size`, or of the main one for 0.

        Raises InputError, which names the sizes that exist, for another size, and StoreError where the map's hash is
        not the manifest's.
        """
        vocab = self.manifest.teacher_form.choose(size)
        path = self.files.more_vocab_maps.get(vocab.size, self.files.vocab_map)
        loaded = VocabMap.load(path)
        if loaded.hash != vocab.hash:
            raise StoreError(f"{path}: expected vocabulary {vocab.hash}, found {loaded.hash}")
        return loaded

    def members(self, split: str) -> NDArray[np.int64]:
        """Return the numbers of a split's conversations, [n] int64, in the prepared dataset's order.

        Raises InputError, which names the splits, for a split that the store does not have.
        """
        if split not in self.manifest.splits:
            raise InputError(
                f"{self.location}: expected one of the splits {list(self.manifest.splits)}, found {split!r}"
            )
        found = np.flatnonzero(self.index["split"] == self.manifest.splits.index(split))
        return found[np.argsort(self.index["dataset_index"][found], kind="stable")]

    def _shard(self, shard: int) -> ShardReader:
        """Return an open shard, and close the one that was used longest ago where there are too many."""
        if shard in self._shards:
            self._shards.move_to_end(shard)
            return self._shards[shard]
        record = self._uncommitted or require_shard(self.storage, shard, self.manifest.hash)
        self._shards[shard] = SHARD_READERS[self.manifest.layout](self.storage, record, self.specs)
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
        """Read all arrays of conversation `number` of `index`, or only those of `names`, in whole or in part.

        - `tokens` (a, b) reads the token arrays at a .. b-1, and only rows and teacher positions within that range.
        - `window` W reads only rows in reach of a start row s in that range, `t <= s < t + W`, including rows before a.

        Without `decode`, taps stay in the form of the arrays that the codec made of them, to be decoded where they are
        used. `out` holds memory for arrays by name, of the stored dtype and at least as long as the rows that are read;
        results are views of it. Shapes and dtypes are those of `schema`. Raises InputError for a name, range or window
        that the store does not hold, and ShardDamagedError where a file differs from its commit record or a checksum
        fails.
        """
        row = self.index[number]
        shard = self._shard(int(row["shard"]))
        wanted = self._expand(names)
        stored = [part for parts in wanted.values() for part in parts]
        axes = {self.specs[name].axis for name in stored}
        kept = self.manifest.window
        selected = select_rows(shard, row, axes, tokens=tokens, window=window, stored_window=kept, where=self.location)
        given = out or {}

        def fetch(name: str) -> NDArray[Any]:
            spec = self.specs[name]
            return read_rows(shard, row, name, spec, selected[spec.axis], given.get(name))

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
        """Return the same conversation with taps as states [R, H] instead of the parts that hold them.

        States are written into the memory that `out` holds for `tap_<layer>`, where it holds any.
        """
        arrays, given = dict(item.arrays), out or {}
        for layer in self.manifest.layers:
            name, parts = tap_name(layer), tuple(self.codec.specs(layer))
            if parts != (name,) and all(part in arrays for part in parts):
                held = {part: arrays.pop(part) for part in parts}
                rows = held[parts[0]].shape[0]
                arrays[name] = self.codec.decode(layer, held, given[name][:rows] if name in given else None)
        return replace(item, arrays=arrays)

    def _expand(self, names: Iterable[str] | None) -> dict[str, tuple[str, ...]]:
        """Return the stored arrays of each name that was asked for: a tap's name stands for the parts that hold it."""
        parts = {tap_name(layer): tuple(self.codec.specs(layer)) for layer in self.manifest.layers}
        if names is None:
            held = {part for group in parts.values() for part in group}
            return parts | {name: (name,) for name in self.specs if name not in held}
        asked = list(names)
        unknown = [name for name in asked if name not in parts and name not in self.specs]
        if unknown:
            raise InputError(f"{self.location}: expected arrays among {[*parts, *self.specs]}, found {unknown}")
        return {name: parts.get(name, (name,)) for name in asked}

    def bytes_on_disk(self) -> int:
        """Return the bytes of all committed shard files, as the commit records say."""
        return sum(item["bytes"] for record in self.records() for item in record["files"].values())

    def close(self) -> None:
        """Close open files and remove copies from an object store."""
        while self._shards:
            self._shards.popitem()[1].close()
        if self._copies is not None:
            self._copies.cleanup()
            self._copies = None


def open_store(location: Location, *, allow_partial: bool = False) -> StoreReader:
    """Open a store in a directory or under a `file://`, `s3://`, `gs://` or `az://` URL, for reading.

    `allow_partial` reads what is committed of a store whose capture has not finished. Raises StoreNotFoundError where
    there is no store, StoreVersionError for another version's, StoreError where it is unfinished or damaged.
    """
    return StoreReader(location, allow_partial=allow_partial)
