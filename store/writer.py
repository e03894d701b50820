"""Writing a store: one process holds the store's lock, and publishes whole shards."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from store.commits import COMMIT_DIRECTORY, committed_shards, read_record, record_path, write_record
from store.errors import StoreError
from store.files import atomic_path, fsync_directory, fsync_tree
from store.manifest import MANIFEST_NAME, StoreManifest
from store.reader import INDEX_NAME, read_shard_index, shard_name, shard_path
from store.schema import INDEX_DTYPE, ROWS_AXIS, TEACHER_AXIS, TOKENS_AXIS, ArraySpec, Conversation
from store.zarr_shards import write_arrays

_FIRST_FIELD = {TOKENS_AXIS: "first_token", ROWS_AXIS: "first_row", TEACHER_AXIS: "first_teacher"}
_COUNT_FIELD = {TOKENS_AXIS: "tokens", ROWS_AXIS: "rows", TEACHER_AXIS: "teacher_rows"}
_LENGTH_ARRAY = {TOKENS_AXIS: "token_ids", ROWS_AXIS: "positions", TEACHER_AXIS: "teacher_positions"}


class StoreWriter:
    """Creates a store or resumes it. Use as a context manager: it holds an exclusive lock while open.

    `prepare_files` is called once, on a new store, to write the top-level files (frozen weights, vocabulary map);
    the manifest is written after them, so that its existence means that they are all there.
    """

    def __init__(self, root: Path, manifest: StoreManifest, prepare_files: Callable[[Path], Sequence[Path]]) -> None:
        self.root = root
        self.manifest = manifest
        root.mkdir(parents=True, exist_ok=True)
        (root / COMMIT_DIRECTORY).mkdir(exist_ok=True)
        (root / "shards").mkdir(exist_ok=True)
        self._lock = self._take_lock()
        try:
            self._remove_leftovers()
            self._create_or_check(prepare_files)
        except BaseException:
            os.close(self._lock)
            raise

    def _remove_leftovers(self) -> None:
        """Delete what a killed writer left under temporary names; the lock says that none is alive."""
        for directory in (self.root, self.root / COMMIT_DIRECTORY, self.root / "shards"):
            for path in directory.glob(".*.partial*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _create_or_check(self, prepare_files: Callable[[Path], Sequence[Path]]) -> None:
        path = self.root / MANIFEST_NAME
        if path.exists():
            StoreManifest.load(self.root).require_same(self.manifest, path)
            return
        for file in prepare_files(self.root):
            write_record(self.root, file.stem, [file])
        self.manifest.save(self.root)

    def _take_lock(self) -> int:
        descriptor = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(descriptor)
            raise StoreError(
                f"{self.root}: another capture is writing this store; wait for it, or choose another --output"
            ) from exc
        return descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def committed(self) -> set[int]:
        """Shards that need no more work."""
        return set(committed_shards(self.root))

    def write_shard(self, shard: int, conversations: Sequence[Conversation], extra: dict[str, Any]) -> int:
        """Write and commit one shard; returns its payload bytes. `extra` goes into the commit record."""
        name = shard_name(shard)
        final = shard_path(self.root, shard)
        shutil.rmtree(final, ignore_errors=True)
        partial = self.root / "shards" / f".{name}.partial"
        specs = self.manifest.array_specs()
        payload = write_arrays(partial, _concatenate(conversations, specs), specs)
        np.save(partial / INDEX_NAME, _index_rows(shard, conversations), allow_pickle=False)
        fsync_tree(partial)
        partial.rename(final)
        fsync_directory(final.parent)
        files = [path for path in final.rglob("*") if path.is_file()]
        counts = {
            "conversations": len(conversations),
            "payload_bytes": payload,
            "manifest_hash": self.manifest.hash,
        }
        write_record(self.root, name, files, counts | extra)
        return payload

    def finish(self) -> None:
        """Write the whole store's index.npy once every shard is committed, so that readers open one file."""
        missing = set(range(self.manifest.shards)) - self.committed()
        if missing:
            raise StoreError(f"{self.root}: expected {self.manifest.shards} shards, {len(missing)} are not committed")
        if read_record(self.root, "index") is not None:
            return
        rows = [read_shard_index(self.root, shard) for shard in range(self.manifest.shards)]
        with atomic_path(self.root / INDEX_NAME) as partial, partial.open("wb") as file:
            np.save(file, np.concatenate(rows) if rows else np.empty(0, INDEX_DTYPE), allow_pickle=False)
        write_record(self.root, "index", [self.root / INDEX_NAME])

    def discard_index(self) -> None:
        """Forget the whole store's index, when a shard is about to be captured again."""
        record_path(self.root, "index").unlink(missing_ok=True)


def _concatenate(conversations: Sequence[Conversation], specs: dict[str, ArraySpec]) -> dict[str, Any]:
    return {
        name: np.concatenate(
            [np.asarray(item.arrays[name], dtype=spec.dtype) for item in conversations]
            or [np.empty((0, *spec.inner), dtype=spec.dtype)]
        )
        for name, spec in specs.items()
    }


def _index_rows(shard: int, conversations: Sequence[Conversation]) -> Any:
    index = np.zeros(len(conversations), dtype=INDEX_DTYPE)
    offsets = dict.fromkeys(_FIRST_FIELD, 0)
    for row, item in zip(index, conversations, strict=True):
        row["content_hash"] = bytes.fromhex(item.content_hash)
        row["shard"], row["split"], row["dataset_index"] = shard, item.split, item.dataset_index
        for axis, first in _FIRST_FIELD.items():
            count = item.arrays[_LENGTH_ARRAY[axis]].shape[0]
            row[first], row[_COUNT_FIELD[axis]] = offsets[axis], count
            offsets[axis] += count
    return index
