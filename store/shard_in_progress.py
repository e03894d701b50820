"""One shard that is being written, from its first conversation to its commit record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from draftcache.store.format.array_spec import COUNT_FIELD, FIRST_FIELD, LENGTH_ARRAY, require_shapes, tap_name
from draftcache.store.format.commits import Record, read_record, shard_name, write_record
from draftcache.store.format.index import INDEX_NAME, npy_bytes
from draftcache.store.format.manifest import StoreManifest
from draftcache.store.format.schema import INDEX_DTYPE, Conversation
from draftcache.store.layouts.registry import SHARD_WRITERS
from draftcache.store.layouts.shard_files import Files, write_small_file
from draftcache.store.storage.base import Lock, Stage, Storage


class ShardInProgress:
    """One shard that is being written. It is a context manager, which removes a shard that was not committed."""

    def __init__(self, storage: Storage, manifest: StoreManifest, shard: int, stage: Stage, lock: Lock) -> None:
        self.number = shard
        self.payload_bytes = 0
        self._storage = storage
        self._manifest = manifest
        self._specs = manifest.array_specs()
        self._stage = stage
        self._lock = lock
        self._format = SHARD_WRITERS[manifest.layout](stage, self._specs)
        self._index: list[NDArray[Any]] = []
        self._lengths = dict.fromkeys(FIRST_FIELD, 0)
        self._closed: tuple[str, Files, NDArray[Any]] | None = None
        self._settled = False  # whether a commit record may exist, so that the files must stay

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not self._settled:
                self._stage.abandon()
        finally:
            self._lock.release()

    def append(self, item: Conversation) -> None:
        """Add a conversation. Its taps are states [R, H], or the parts that the store's codec makes of them.

        Raises InputError for states that the codec cannot store, or arrays of other shapes, and StorageError.
        """
        arrays = dict(item.arrays)
        for layer in self._manifest.layers:
            if tap_name(layer) in arrays and tap_name(layer) not in self._specs:
                arrays |= self._manifest.codec.encode(layer, arrays.pop(tap_name(layer)))
            elif tap_name(layer) in arrays:
                arrays[tap_name(layer)] = self._manifest.codec.encode(layer, arrays[tap_name(layer)])[tap_name(layer)]
        stored = replace(item, arrays={name: arrays[name] for name in self._specs})
        require_shapes(stored.arrays, self._specs)
        self._format.append(stored)
        self._index.append(self._index_row(stored))
        self.payload_bytes += stored.nbytes

    def _index_row(self, item: Conversation) -> NDArray[Any]:
        """Return the index row [1] of the next conversation, and count its slices."""
        row = np.zeros(1, INDEX_DTYPE)
        row["content_hash"] = bytes.fromhex(item.content_hash)
        row["shard"], row["split"], row["dataset_index"] = self.number, item.split, item.dataset_index
        row["loss_tokens"] = int(item.loss_mask.sum())
        for axis, first in FIRST_FIELD.items():
            count = item.arrays[LENGTH_ARRAY[axis]].shape[0]
            row[first], row[COUNT_FIELD[axis]] = self._lengths[axis], count
            self._lengths[axis] += count
        return row

    def close(self) -> None:
        """Make the files durable under their final names; nothing can be appended any more. Raises StorageError.

        This is nearly all of a commit's work, and may be done in another thread. The shard is removed at the context
        manager's end unless `commit` follows.
        """
        if self._closed is not None:
            return
        files = self._format.close()
        index = np.concatenate(self._index) if self._index else np.empty(0, INDEX_DTYPE)
        files[INDEX_NAME] = write_small_file(self._stage, INDEX_NAME, npy_bytes(index))
        directory = self._stage.publish(lambda: read_record(self._storage, shard_name(self.number)) is not None)
        self._closed = directory, files, index

    def commit(self, extra: dict[str, Any], check: Callable[[Record], None] | None = None) -> bool:
        """Close and publish the shard. `extra` holds further fields of its commit record.

        `check` is called with the record before it is written, when the files have their final names: an error that it
        raises leaves the shard uncommitted. Returns False, and removes the shard, where another writer's record was
        there first. Raises StorageError.
        """
        self.close()
        assert self._closed is not None, "close() has set it"
        directory, files, index = self._closed
        record: Record = {
            "directory": directory,
            "files": {f"{directory}/{name}": files[name] for name in sorted(files)},
            "lengths": self._lengths,
            "conversations": len(index),
            "loss_tokens": int(index["loss_tokens"].sum()),
            "payload_bytes": self.payload_bytes,
            "manifest_hash": self._manifest.hash,
        } | extra
        if check is not None:
            check(record)
        # From here on the files stay, because a call that breaks off may have written the record that names them.
        self._settled = True
        if not write_record(self._storage, shard_name(self.number), record):
            self._stage.abandon()
            return False
        self._stage.settle()
        return True
