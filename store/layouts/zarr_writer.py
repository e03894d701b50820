"""Writes zarr shards directly: rows go from the caller's memory into `writev`, with no copy between.

`tools/bench/results/store-*.json` holds measurements beside zarr-python.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from awscrt.checksums import crc32c
from numcodecs import Zstd
from numpy.typing import NDArray

from draftcache.store.common.files import Buffer, hash_bytes
from draftcache.store.format.array_spec import ArraySpec
from draftcache.store.format.schema import Conversation
from draftcache.store.layouts.shard_files import (
    PARALLEL_BYTES,
    Files,
    HashedFile,
    Run,
    run_later,
    run_now,
    write_small_file,
)
from draftcache.store.layouts.zarr_format import (
    CRC_BYTES,
    END_HASH,
    INDEX_ENTRY,
    METADATA,
    array_metadata,
    data_file,
    json_bytes,
    node,
)
from draftcache.store.storage.base import Stage

_ZSTD = Zstd(level=1)
_HOT_BYTES = 1 << 20
"""Rows are checksummed, hashed and written in pieces of about this size, so that a cache still holds them."""


class _ArrayWriter(ABC):
    """Appends rows to the file of one array.

    Chunks that hold only zeros are written too, so that a missing chunk is always an error.
    """

    def __init__(self, file: HashedFile, spec: ArraySpec) -> None:
        self._file = file
        self._spec = spec
        self._row_bytes = spec.row_bytes
        self._chunk_rows = spec.chunk_rows
        self._filled = 0  # rows of the current chunk
        self._index: list[tuple[int, int]] = []  # offset and bytes of each encoded chunk
        self._last_crc = b""
        self.rows = 0

    def append(self, values: NDArray[Any], run: Run = run_later) -> Callable[[], None]:
        """Take rows [n, *inner] of the spec's dtype, and return a function that writes them.

        Part of the work may begin at once, through `run`.
        """
        data = np.ascontiguousarray(values, self._spec.stored_dtype).reshape(-1).view(np.uint8)
        self.rows += values.shape[0]
        return self._append(data, run)

    @abstractmethod
    def _append(self, data: NDArray[np.uint8], run: Run) -> Callable[[], None]:
        """Take whole rows as bytes, as `append` does."""

    def _pieces(self, data: NDArray[np.uint8]) -> Iterator[tuple[NDArray[np.uint8], bool]]:
        """Cut rows at the ends of chunks. Yields each piece, and whether it ends a chunk."""
        taken, rows = 0, data.nbytes // self._row_bytes
        while taken < rows:
            count = min(self._chunk_rows - self._filled, rows - taken)
            piece = data[taken * self._row_bytes : (taken + count) * self._row_bytes]
            taken += count
            self._filled = (self._filled + count) % self._chunk_rows
            yield piece, self._filled == 0

    def _end_chunk(self, size: int, crc: int) -> bytes:
        """Record a chunk of `size` encoded bytes in the index. Returns the bytes of its crc32c."""
        offset = sum(self._index[-1]) if self._index else 0
        self._index.append((offset, size + CRC_BYTES))
        self._last_crc = crc.to_bytes(CRC_BYTES, "little")
        return self._last_crc

    def close(self) -> dict[str, Any]:
        """Pad the last chunk with zeros, as zarr does, and write the index.

        Returns the file's entry in the commit record.
        """
        if self._filled:
            padding = np.zeros((self._chunk_rows - self._filled, *self._spec.inner), self._spec.stored_dtype)
            self.append(padding)()
            self.rows -= padding.shape[0]
        index = np.array(self._index, INDEX_ENTRY).tobytes()
        end = [index, crc32c(index).to_bytes(CRC_BYTES, "little")]
        self._file.write(end)
        return self._file.close() | {END_HASH: hash_bytes(self._last_crc, *end)}


class _RawWriter(_ArrayWriter):
    """Writes chunks as they are."""

    _crc = 0

    def _append(self, data: NDArray[np.uint8], run: Run) -> Callable[[], None]:
        return partial(self._write, data)

    def _write(self, data: NDArray[np.uint8]) -> None:
        out: list[Buffer] = []
        held = 0
        for piece, ends in self._pieces(data):
            self._crc = crc32c(piece, self._crc)
            out.append(piece.data)
            if ends:
                out.append(self._end_chunk(self._chunk_rows * self._row_bytes, self._crc))
                self._crc = 0
            held += piece.nbytes
            if held >= _HOT_BYTES:
                self._file.write(out)
                out, held = [], 0
        if out:
            self._file.write(out)


class _CompressedWriter(_ArrayWriter):
    """Writes compressed chunks.

    Chunks are independent of each other, so the chunks of a long conversation may be compressed side by side.
    """

    def __init__(self, file: HashedFile, spec: ArraySpec) -> None:
        super().__init__(file, spec)
        self._pending: list[NDArray[np.uint8]] = []

    def _append(self, data: NDArray[np.uint8], run: Run) -> Callable[[], None]:
        chunks: list[Callable[[], NDArray[np.uint8]]] = []
        for piece, ends in self._pieces(data):
            if ends:
                chunks.append(run(partial(_compressed, [*self._pending, piece])))
                self._pending = []
            else:
                self._pending.append(piece.copy())  # the caller may reuse it
        return partial(self._write, chunks)

    def _write(self, chunks: list[Callable[[], NDArray[np.uint8]]]) -> None:
        for made in chunks:
            encoded = made()
            self._file.write([encoded.data, self._end_chunk(encoded.nbytes, crc32c(encoded))])


def _compressed(pieces: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    return np.frombuffer(_ZSTD.encode(pieces[0] if len(pieces) == 1 else np.concatenate(pieces)), np.uint8)


class ZarrShardWriter:
    """Writes one zarr shard, conversation by conversation. Implements `ShardWriter`.

    Chunks of a large conversation are compressed side by side, and its arrays, each of which is a separate file, are
    hashed and written side by side. Memory holds less than one chunk per compressed array, and a conversation's
    compressed chunks until they are written.
    """

    def __init__(self, stage: Stage, specs: dict[str, ArraySpec]) -> None:
        self._stage = stage
        self._specs = specs
        self._arrays: dict[str, _ArrayWriter] = {}

    def append(self, item: Conversation) -> None:
        for name, spec in self._specs.items():
            values = item.arrays[name]
            if not values.shape[0]:
                continue
            if name not in self._arrays:  # as in zarr, an array without rows has no file
                kind = _CompressedWriter if spec.compress else _RawWriter
                self._arrays[name] = kind(HashedFile(self._stage.open(data_file(name, spec))), spec)
        filled = {name: item.arrays[name] for name in self._specs if item.arrays[name].shape[0]}
        run = run_now if item.nbytes >= PARALLEL_BYTES else run_later
        # Compression begins before the writes that wait for it, so that a write never keeps a thread from compressing.
        writes = [self._arrays[name].append(values, run) for name, values in filled.items()]
        for done in [run(write) for write in writes]:
            done()

    def close(self) -> Files:
        files = {METADATA: write_small_file(self._stage, METADATA, json_bytes({"attributes": {}} | node("group")))}
        closing = {name: run_now(array.close) for name, array in self._arrays.items()}
        closed = {name: done() for name, done in closing.items()}
        for name, spec in self._specs.items():
            rows = 0
            if name in closed:
                files[data_file(name, spec)] = closed[name]
                rows = self._arrays[name].rows
            metadata = f"{name}/{METADATA}"
            files[metadata] = write_small_file(self._stage, metadata, json_bytes(array_metadata(spec, rows)))
        return files
