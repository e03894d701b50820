"""Writes a store: any number of processes publish whole shards, and each shard has one writer."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from draftcache.store.common.errors import StoreError
from draftcache.store.common.files import hash_file
from draftcache.store.common.sealed_json import seal
from draftcache.store.format.commits import (
    COMMIT_DIRECTORY,
    SETTINGS_HASH,
    SHARDS_DIRECTORY,
    Record,
    RecordMissingError,
    committed_shards,
    read_record,
    record_name,
    require_manifest,
    require_record,
    shard_name,
)
from draftcache.store.format.index import INDEX_RECORD, write_store_index
from draftcache.store.format.manifest import StoreManifest, top_level_names
from draftcache.store.format.schema import Conversation
from draftcache.store.output_check import require_own_or_empty
from draftcache.store.shard_in_progress import ShardInProgress
from draftcache.store.storage.asking import ask_side_by_side
from draftcache.store.storage.base import Location, Lock, open_storage
from draftcache.store.storage.local import LocalStorage

CLEANING_S = 10.0
"""Seconds that a writer waits for another one's start. A lock held for longer is an exclusive job's."""
_POLL_S = 0.05
_OWN_DIRECTORIES = ("", SHARDS_DIRECTORY, COMMIT_DIRECTORY)


class StoreWriter:
    """Creates a store or resumes it. It is used as a context manager."""

    def __init__(
        self,
        location: Location,
        manifest: StoreManifest,
        prepare_files: Callable[[Path], Sequence[Path]],
        *,
        exclusive: bool = False,
    ) -> None:
        """Open the store at a path or URL, and create it where there is none.

        On a new store, or on one that lacks a top-level file, `prepare_files` is called once with an empty directory.
        It writes the top-level files (frozen weights, vocabulary maps) there and returns their paths. The manifest is
        written after them, so that its existence means that they are all there. `exclusive` refuses to share the store
        with another live writer of this machine.

        Raises StoreError where another writer holds the store alone, or where any writer holds it and `exclusive` is
        set; ManifestMismatchError where the store was made with other settings; InputError where the directory holds
        other files and no store; StorageError.
        """
        self.storage = open_storage(location)
        require_own_or_empty(self.storage)
        self.manifest = manifest
        self._specs = manifest.array_specs()
        self._lock = self._take_lock(exclusive)
        try:
            self._create_or_check(prepare_files)
        except BaseException:
            self._lock.release()
            raise

    def _take_lock(self, exclusive: bool) -> Lock:
        """Take the store's lock. Where no other writer is alive, the leftovers of killed writers are removed first."""
        alone = self.storage.lock("store")
        if alone is not None:
            self._remove_leftovers()
            if exclusive:
                return alone
            alone.release()
        lock = None
        deadline = time.monotonic() + CLEANING_S
        while not exclusive and lock is None and time.monotonic() < deadline:
            lock = self.storage.lock("store", shared=True)
            if lock is None:
                time.sleep(_POLL_S)  # another writer that is starting may be removing leftovers
        if lock is None:
            raise StoreError(
                f"{self.storage.describe()}: another job is writing this store alone; wait for it, or choose another "
                "--output"
            )
        return lock

    def _remove_leftovers(self) -> None:
        if isinstance(self.storage, LocalStorage):
            self.storage.remove_leftovers(_OWN_DIRECTORIES)

    def _create_or_check(self, prepare_files: Callable[[Path], Sequence[Path]]) -> None:
        while not self._is_whole():
            creating = self.storage.lock("create")
            if creating is None:
                time.sleep(_POLL_S)  # another writer is creating the store
                continue
            try:
                if not self._is_whole():
                    self._create(prepare_files)
            finally:
                creating.release()
        StoreManifest.load(self.storage).require_same(self.manifest, self.storage.describe())

    def _is_whole(self) -> bool:
        """Return whether the manifest and all top-level files are there.

        One of the files may be missing because `repair` has taken it out.
        """
        if not StoreManifest.exists(self.storage):
            return False
        StoreManifest.load(self.storage).require_same(self.manifest, self.storage.describe())
        stems = [Path(name).stem for name in top_level_names(self.manifest)]
        records = list(ask_side_by_side(self.storage, self._top_level_record, stems))
        for stem, record in zip(stems, records, strict=True):
            require_manifest(self.storage, stem, record or {}, self.manifest.settings_hash, field=SETTINGS_HASH)
        return all(records)

    def _top_level_record(self, stem: str) -> Record | None:
        try:
            return require_record(self.storage, stem)  # the manifest, which was written later, says that it is there
        except RecordMissingError:
            return None

    def _create(self, prepare_files: Callable[[Path], Sequence[Path]]) -> None:
        with tempfile.TemporaryDirectory(prefix="draftcache-") as directory:
            for path in prepare_files(Path(directory)):
                self.storage.put_file(path.name, path)
                entry = {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)}
                record = {"files": {path.name: entry}, SETTINGS_HASH: self.manifest.settings_hash}
                # Put over what an attempt without a manifest left, or a rival on a filesystem without locks just wrote.
                self.storage.put(record_name(path.stem), seal(record))
        self.manifest.create(self.storage)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def committed(self) -> set[int]:
        """Return the numbers of the shards that need no more work."""
        return set(committed_shards(self.storage))

    def shard(self, shard: int) -> ShardInProgress | None:
        """Begin a shard.

        The result is None where the shard is committed already, or another live process of this machine writes it.
        """
        lock = self.storage.lock(shard_name(shard))
        if lock is None:
            return None
        if read_record(self.storage, shard_name(shard)) is not None:
            lock.release()
            return None
        try:
            stage = self.storage.stage(f"{SHARDS_DIRECTORY}/{shard_name(shard)}")
        except BaseException:
            lock.release()
            raise
        return ShardInProgress(self.storage, self.manifest, shard, stage, lock)

    def write_shard(self, shard: int, conversations: Sequence[Conversation], extra: dict[str, Any]) -> int:
        """Write and commit one shard. Returns the bytes of its arrays before compression.

        `extra` holds further fields of the commit record. Raises StoreError where the shard is committed, or is being
        written, already.
        """
        begun = self.shard(shard)
        if begun is None:
            raise StoreError(f"{self.storage.describe()}: expected shard {shard} to be free, found it taken")
        with begun:
            for item in conversations:
                begun.append(item)
            begun.commit(extra)
        return begun.payload_bytes

    def finish(self) -> bool:
        """Write the whole store's index.npy once every shard is committed, so that readers open one file.

        Returns False where shards are still missing, because another writer has them or they are not written yet.
        """
        finished = write_store_index(self.storage, self.manifest)
        if finished:
            self._remove_leftovers()
        return finished

    def discard_index(self) -> None:
        """Remove the commit record of the whole store's index, before a shard is captured again."""
        self.storage.delete(record_name(INDEX_RECORD))
