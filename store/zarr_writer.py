"""Writing zarr shards directly: rows go from the caller's memory into `writev`, with no copy between.

Measured beside zarr-python in `tools/bench/results/store-*.json`.
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from awscrt.checksums import crc32c
from numcodecs import Zstd
from numpy.typing import NDArray

from store.files import Buffer
from store.schema import ArraySpec, Conversation
from store.shard_files import Files, HashedFile, write_small_file
from store.storage import Stage
from store.zarr_format import CRC_BYTES, INDEX_ENTRY, METADATA, array_metadata, data_file, json_bytes, node

_ZSTD = Zstd(level=1)
_HOT_BYTES = 1 << 20
"""Rows are checksummed, hashed and written in pieces of about this size, so that a cache still holds them."""
_PARALLEL_BYTES = 1 << 22
"""A conversation of fewer bytes is written before threads would have begun."""


class _ArrayWriter:
    """Appends rows to one array. Chunks that hold only zeros are written too: a missing one is then always an error."""

    def __init__(self, file: HashedFile, spec: ArraySpec) -> None:
        self._file = file
        self._spec = spec
        self._row_bytes = spec.row_bytes
        self._chunk_rows = spec.chunk_rows
        self._pending: list[NDArray[np.uint8]] = []
        self._filled = 0  # rows of the current chunk
        self._crc = 0
        self._index: list[tuple[int, int]] = []
        self.rows = 0

    def append(self, values: NDArray[Any]) -> None:
        """Rows [n, *inner] of the spec's dtype."""
        data = np.ascontiguousarray(values, self._spec.stored_dtype).reshape(-1).view(np.uint8)
        rows, taken, held = values.shape[0], 0, 0
        out: list[Buffer] = []
        while taken < rows:
            count = min(self._chunk_rows - self._filled, rows - taken)
            piece = data[taken * self._row_bytes : (taken + count) * self._row_bytes]
            taken += count
            self._filled += count
            if self._spec.compress:
                # What the caller may reuse is copied; a whole chunk is compressed before this returns.
                self._pending.append(piece.copy() if self._filled < self._chunk_rows else piece)
            else:
                self._crc = crc32c(piece, self._crc)
                out.append(piece.data)
            if self._filled == self._chunk_rows:
                out += self._end_chunk()
            held += piece.nbytes
            if held >= _HOT_BYTES:
                self._file.write(out)
                out, held = [], 0
        if out:
            self._file.write(out)
        self.rows += rows

    def _end_chunk(self) -> list[Buffer]:
        """What closes the chunk: its compressed rows, where they are compressed, and its crc32c."""
        size = self._chunk_rows * self._row_bytes
        out: list[Buffer] = []
        if self._spec.compress:
            rows = self._pending[0] if len(self._pending) == 1 else np.concatenate(self._pending)
            encoded = np.frombuffer(_ZSTD.encode(rows), np.uint8)
            self._crc, size = crc32c(encoded), encoded.nbytes
            out.append(encoded.data)
        out.append(self._crc.to_bytes(CRC_BYTES, "little"))
        offset = sum(self._index[-1]) if self._index else 0
        self._index.append((offset, size + CRC_BYTES))
        self._pending, self._filled, self._crc = [], 0, 0
        return out

    def close(self) -> dict[str, Any]:
        """Pad the last chunk with zeros, as zarr does; write the index."""
        if self._filled:
            padding = np.zeros((self._chunk_rows - self._filled, *self._spec.inner), self._spec.stored_dtype)
            self.append(padding)
            self.rows -= padding.shape[0]
        index = np.array(self._index, INDEX_ENTRY).tobytes()
        self._file.write([index, crc32c(index).to_bytes(CRC_BYTES, "little")])
        return self._file.close()


@functools.cache
def _pool(_process: int) -> ThreadPoolExecutor:
    """Of this process: threads do not survive a fork."""
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="draftcache-arrays")


class ZarrShardWriter:
    """Writes one shard, conversation by conversation; memory holds less than one chunk per compressed array.

    Arrays are files of their own, so those of a large conversation are compressed, hashed and written side by side.
    """

    def __init__(self, stage: Stage, specs: dict[str, ArraySpec]) -> None:
        self._stage = stage
        self._specs = specs
        self._arrays: dict[str, _ArrayWriter] = {}

    def append(self, item: Conversation) -> None:
        """One conversation, its arrays as they are stored."""
        for name, spec in self._specs.items():
            values = item.arrays[name]
            if not values.shape[0]:
                continue
            if name not in self._arrays:  # an array without rows has no file, as zarr has it
                self._arrays[name] = _ArrayWriter(HashedFile(self._stage.open(data_file(name, spec))), spec)
        filled = [name for name in self._specs if item.arrays[name].shape[0]]

        def append(name: str) -> None:
            self._arrays[name].append(item.arrays[name])

        if sum(item.arrays[name].nbytes for name in filled) >= _PARALLEL_BYTES:
            list(_pool(os.getpid()).map(append, filled))
        else:
            for name in filled:
                append(name)

    def close(self) -> Files:
        """Finish every file; returns their table, names relative to the shard."""
        files = {METADATA: write_small_file(self._stage, METADATA, json_bytes({"attributes": {}} | node("group")))}
        closed = dict(zip(self._arrays, _pool(os.getpid()).map(_ArrayWriter.close, self._arrays.values()), strict=True))
        for name, spec in self._specs.items():
            rows = 0
            if name in closed:
                files[data_file(name, spec)] = closed[name]
                rows = self._arrays[name].rows
            metadata = f"{name}/{METADATA}"
            files[metadata] = write_small_file(self._stage, metadata, json_bytes(array_metadata(spec, rows)))
        return files
