"""Reads a store's committed shards at random: by conversation, in any subset of arrays and rows."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from draftcache.store.common.errors import InputError, ShardDamagedError, StoreError
from draftcache.store.format.array_spec import tap_name
from draftcache.store.format.commits import (
    Record,
    committed_shards,
    require_shard,
    require_shards,
)
from draftcache.store.format.index import (
    indexed_records,
    join_indexes,
    read_store_index,
)
from draftcache.store.format.manifest import StoreManifest
from draftcache.store.format.schema import Conversation
from draftcache.store.format.vocab_map import VocabMap
from draftcache.store.layouts.registry import SHARD_READERS, ShardReader
from draftcache.store.row_selection import ConversationArrays, read_rows, select_rows
from draftcache.store.storage.asking import ask_side_by_side
from draftcache.store.storage.base import Location, Storage, open_storage
from draftcache.store.top_files import StoreFiles, TopFiles

_OPEN_SHARDS = 16
_REMOTE_READS = 16  # arrays that are fetched at once from an object store


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
        self._top_files = TopFiles(storage, manifest)
        self._uncommitted = record
        self._kept: dict[tuple[int, int], ConversationArrays] | None = None
        self._directories: dict[int, str] = {}  # of each opened shard, another one for each attempt at the shard
        self.finished = False

    def _load_index(self, allow_partial: bool) -> NDArray[Any]:
        index = read_store_index(self.storage, self.manifest)
        if index is not None:
            self.finished = True
            return index
        if not allow_partial:
            raise StoreError(
                f"{self.location}: expected a finished store of {self.manifest.shards} shards, found "
                f"{len(committed_shards(self.storage))} committed; rerun the capture command to finish it"
            )
        return join_indexes(self.storage, self.records())

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
        yield from require_shards(self.storage, committed_shards(self.storage), self.manifest.hash)

    @cached_property
    def files(self) -> StoreFiles:
        """The frozen weights and the vocabulary maps, after a check of their xxh3-128.

        Files of an object store are copied to a temporary directory, which `close` removes. Raises StoreError where a
        file has no commit record, and ShardDamagedError where it differs from its record.
        """
        return self._top_files.paths()

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
        self._directories[shard] = record["directory"]
        self._shards[shard] = SHARD_READERS[self.manifest.layout](self.storage, record, self.specs)
        if len(self._shards) > _OPEN_SHARDS:
            self._shards.popitem(last=False)[1].close()
        return self._shards[shard]

    def _has_moved(self, shard: int) -> bool:
        """Return whether an object store now gives another commit record of a shard than when the shard was opened.

        So it is where the first one was out of date, or the shard was repaired since. Its next read opens it anew.
        """
        for pause in self.storage.pauses if self._uncommitted is None and shard in self._directories else ():
            if require_shard(self.storage, shard, self.manifest.hash)["directory"] != self._directories[shard]:
                self._shards.pop(shard, None)
                return True
            time.sleep(pause)
        return False

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
        row, given = self.index[number], out or {}
        stored = [part for parts in self._expand(names).values() for part in parts]
        fetch = partial(self._fetch, row, stored, tokens, window, given)
        try:
            found = fetch()
        except ShardDamagedError:
            if not self._has_moved(int(row["shard"])):
                raise
            found = fetch()
        item = Conversation(
            content_hash=row["content_hash"].tobytes().hex(),
            split=int(row["split"]),
            dataset_index=int(row["dataset_index"]),
            arrays=found,
        )
        return self.decode(item, out=given) if decode else item

    def _fetch(
        self,
        row: np.void,
        stored: list[str],
        tokens: tuple[int, int] | None,
        window: int | None,
        out: Mapping[str, NDArray[Any]],
    ) -> dict[str, NDArray[Any]]:
        """Return the rows of the `stored` arrays that `read` is asked for, by name."""
        arrays = self._arrays(row)
        axes, kept = {self.specs[name].axis for name in stored}, self.manifest.window
        selected = select_rows(
            arrays, self.specs, axes, tokens=tokens, window=window, stored_window=kept, where=self.location
        )

        def rows(name: str) -> NDArray[Any]:
            spec = self.specs[name]
            if self._kept is not None:
                arrays.whole(name, spec)
            return read_rows(arrays, name, spec, selected[spec.axis], out.get(name))

        return dict(zip(stored, ask_side_by_side(self.storage, rows, stored, at_once=_REMOTE_READS), strict=True))

    @contextmanager
    def keeping_arrays(self) -> Iterator[None]:
        """Keep what is read in this context in memory, each array whole, so that reading it again reads no file."""
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None

    def _arrays(self, row: np.void) -> ConversationArrays:
        arrays = ConversationArrays(self._shard(int(row["shard"])), row)
        if self._kept is None:
            return arrays
        key = (id(arrays.shard), int(row["first_token"]))  # a shard that was repaired meanwhile is another object
        return self._kept.setdefault(key, arrays)

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
        self._top_files.close()


def open_store(location: Location, *, allow_partial: bool = False) -> StoreReader:
    """Open a store in a directory or under a `file://`, `s3://`, `gs://` or `az://` URL, for reading.

    `allow_partial` reads what is committed of a store whose capture has not finished. Raises StoreNotFoundError where
    there is no store, StoreVersionError for another version's, StoreError where it is unfinished or damaged.
    """
    return StoreReader(location, allow_partial=allow_partial)
