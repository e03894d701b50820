"""Reads zarr shards directly: rows go by `preadv` into the caller's memory.

The crc32c of every chunk that is touched is checked.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
from awscrt.checksums import crc32c
from numcodecs import Zstd
from numpy.typing import NDArray

from draftcache.store.common.errors import ShardDamagedError
from draftcache.store.common.files import hash_bytes
from draftcache.store.format.array_spec import FIRST_FIELD, ArraySpec
from draftcache.store.format.commits import Record, open_committed
from draftcache.store.layouts.zarr_format import CRC_BYTES, END_HASH, INDEX_ENTRY, data_file
from draftcache.store.storage.asking import ask_again
from draftcache.store.storage.base import RangeFile, Storage

_ZSTD = Zstd(level=1)
_REPAIR = "run `draftcache repair` on the store, then the capture command again"
_HOT_BYTES = 1 << 20
"""Bytes of a group of chunks that are read by one call. A cache still holds that many when they are checksummed."""


class ZarrShard:
    """Reads row ranges of one committed zarr shard. Implements `ShardReader`."""

    whole_arrays = False

    def __init__(self, storage: Storage, record: Record, specs: dict[str, ArraySpec]) -> None:
        self._storage = storage
        self._record = record
        self._specs = specs
        self._open: dict[str, tuple[RangeFile, NDArray[Any]]] = {}

    def read(self, row: np.void, name: str, first: int, count: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Read rows, after a check of the crc32c of every chunk that holds one of them.

        Raises ShardDamagedError where the file is not the committed one, or a chunk is missing or fails its checksum.
        """
        spec = self._specs[name]
        if out is None:
            out = np.empty((count, *spec.inner), spec.stored_dtype)
        if count:
            start = int(row[FIRST_FIELD[spec.axis]]) + first
            self._read(name, start, out.reshape(-1).view(np.uint8))
        return out

    def close(self) -> None:
        for file, _ in self._open.values():
            file.close()
        self._open.clear()

    def _read(self, name: str, start: int, out: NDArray[np.uint8]) -> None:
        """Fill `out` with whole rows of an array, from row `start` of the shard on."""
        spec = self._specs[name]
        file, index = self._file(name)
        rows, long = out.nbytes // spec.row_bytes, spec.chunk_rows
        chunks = range(start // long, -(-(start + rows) // long))
        if chunks.stop > len(index):
            raise ShardDamagedError(
                f"{self._where(name)}: expected at least {start + rows} rows, found {len(index) * long}"
            )
        read = self._read_compressed if spec.compress else self._read_raw
        for run in _contiguous_runs(index, chunks):
            low, high = max(run.start * long, start), min(run.stop * long, start + rows)
            target = out[(low - start) * spec.row_bytes : (high - start) * spec.row_bytes]
            # A remote answer can be damaged on its way, so it is asked for again before the shard is blamed.
            ask_again(self._storage, partial(read, name, file, run, low, target))

    def _read_raw(self, name: str, file: RangeFile, run: range, start: int, out: NDArray[np.uint8]) -> None:
        """Read uncompressed rows, from row `start` of the shard on, straight into `out`.

        The other rows of the run's first and last chunk go into scratch memory, because the checksums cover them too.
        """
        row_bytes, long = self._specs[name].row_bytes, self._specs[name].chunk_rows
        chunk_bytes = long * row_bytes
        index = self._open[name][1]
        if (index["bytes"][run.start : run.stop] != chunk_bytes + CRC_BYTES).any():
            raise ShardDamagedError(f"{self._where(name)}: expected chunks of {chunk_bytes} bytes, found others")
        head = (start - run.start * long) * row_bytes
        before, after = np.empty(head, np.uint8), np.empty(len(run) * chunk_bytes - head - out.nbytes, np.uint8)
        crcs = np.empty((len(run), CRC_BYTES), np.uint8)
        pieces: list[list[NDArray[np.uint8]]] = []
        for number in range(len(run)):
            low, high = number * chunk_bytes - head, (number + 1) * chunk_bytes - head
            parts = (before if number == 0 else before[:0], out[max(low, 0) : max(high, 0)])
            pieces.append([*parts, after if number == len(run) - 1 else after[:0]])
        # A disk is read in groups of chunks, each checksummed while a cache holds it; a network is read in one go.
        step = max(1, _HOT_BYTES // chunk_bytes) if self._storage.local_root is not None else len(run)
        for first in range(0, len(run), step):
            group = range(first, min(first + step, len(run)))
            buffers = [part.data for number in group for part in (*pieces[number], crcs[number])]
            file.read_into(int(index["offset"][run.start + first]), buffers)
            for number in group:
                crc = 0
                for part in pieces[number]:
                    crc = crc32c(part, crc)
                if crc != int.from_bytes(crcs[number].tobytes(), "little"):
                    raise self._checksum_error(name, run.start + number)

    def _read_compressed(self, name: str, file: RangeFile, run: range, start: int, out: NDArray[np.uint8]) -> None:
        """Read and decompress rows, from row `start` of the shard on, into `out`."""
        row_bytes, long = self._specs[name].row_bytes, self._specs[name].chunk_rows
        index = self._open[name][1]
        entries = index[run.start : run.stop]
        origin = int(entries["offset"][0])
        encoded = np.empty(int(entries["bytes"].sum()), np.uint8)
        file.read_into(origin, [encoded.data])
        for number, (offset, size) in zip(run, entries.tolist(), strict=True):
            data = encoded[offset - origin : offset - origin + size]
            crc = int.from_bytes(data[-CRC_BYTES:].tobytes(), "little")
            if size <= CRC_BYTES or crc32c(data[:-CRC_BYTES]) != crc:
                raise self._checksum_error(name, number)
            low = max(number * long, start)
            high = min((number + 1) * long, start + out.nbytes // row_bytes)
            target = out[(low - start) * row_bytes : (high - start) * row_bytes]
            whole = high - low == long
            rows = target if whole else np.empty(long * row_bytes, np.uint8)
            try:
                _ZSTD.decode(data[:-CRC_BYTES], rows)
            except (RuntimeError, ValueError) as exc:
                raise self._checksum_error(name, number) from exc
            if not whole:
                first = (low - number * long) * row_bytes
                target[:] = rows[first : first + target.nbytes]

    def chunks(self, name: str) -> int:
        """Return the number of chunks of one array. Raises ShardDamagedError where its chunk index can't be trusted."""
        return len(self._file(name)[1])

    def _file(self, name: str) -> tuple[RangeFile, NDArray[Any]]:
        """Return an array's open file and its chunk index, of dtype `INDEX_ENTRY`."""
        if name not in self._open:
            spec = self._specs[name]
            path = f"{self._record['directory']}/{data_file(name, spec)}"
            file = open_committed(self._storage, self._record, path)
            chunks = -(-int(self._record["lengths"][spec.axis]) // spec.chunk_rows)
            end = self._record["files"][path].get(END_HASH)
            read = partial(_read_index, file, chunks, self._where(name), end)
            self._open[name] = file, ask_again(self._storage, read)
        return self._open[name]

    def _where(self, name: str) -> str:
        return self._storage.describe(f"{self._record['directory']}/{data_file(name, self._specs[name])}")

    def _checksum_error(self, name: str, chunk: int) -> ShardDamagedError:
        long = self._specs[name].chunk_rows
        return ShardDamagedError(
            f"{self._where(name)}: rows {chunk * long} to {(chunk + 1) * long} of the shard fail their "
            f"crc32c; {_REPAIR}"
        )


def _contiguous_runs(index: NDArray[Any], chunks: range) -> list[range]:
    """Split the chunks where the next one does not follow in the file.

    Files that draftcache wrote are never split; files of other writers may be.
    """
    entries = index[chunks.start : chunks.stop]
    ends = entries["offset"][:-1] + entries["bytes"][:-1]
    breaks = [chunks.start + 1 + int(number) for number in np.flatnonzero(ends != entries["offset"][1:])]
    edges = [chunks.start, *breaks, chunks.stop]
    return [range(low, high) for low, high in itertools.pairwise(edges)]


def _read_index(file: RangeFile, chunks: int, where: str, end: str | None) -> NDArray[Any]:
    """Return the chunk index at the end of an array's file. Raises ShardDamagedError where it can't be trusted.

    `end` is the commit record's hash of the file's end, from the last chunk's crc32c on, where it has one.
    """
    size = chunks * INDEX_ENTRY.itemsize
    start = file.size - size - CRC_BYTES
    last_crc, data = np.zeros(CRC_BYTES, np.uint8), np.empty(size + CRC_BYTES, np.uint8)
    if start >= CRC_BYTES:
        file.read_into(start - CRC_BYTES, [last_crc.data, data.data])
    crc = int.from_bytes(data[-CRC_BYTES:].tobytes(), "little")
    if start < CRC_BYTES or crc32c(data[:-CRC_BYTES]) != crc:
        raise ShardDamagedError(f"{where}: expected an index of {chunks} chunks, its crc32c is wrong; {_REPAIR}")
    index = data[:-CRC_BYTES].view(INDEX_ENTRY)
    # A chunk that was never written has offset and size 2**64 - 1, which ends beyond any file.
    if (index["offset"] > start).any() or (index["bytes"] > start - index["offset"]).any():
        raise ShardDamagedError(
            f"{where}: expected every chunk inside the file, found some missing or outside; {_REPAIR}"
        )
    if end is not None and (found := hash_bytes(last_crc.data, data.data)) != end:
        raise ShardDamagedError(
            f"{where}: expected an array whose end has xxh3-128 {end}, found {found}; it is damaged, or another file "
            f"of the same size took its place: put the right one back, or {_REPAIR}"
        )
    return index
