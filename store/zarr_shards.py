"""A shard is a zarr v3 group with one `sharding_indexed` file per array, every inner chunk ending in crc32c.

Any zarr v3 reader opens it. bf16 taps are stored as uint16 bit patterns, since zarr has no bfloat16. Our own reads go
straight to the file (index, one `pread`, crc32c): a conversation of the demo takes 0.8 ms, with zarr-python 12 ms.

The file of an array: encoded inner chunks, then an index of (offset, bytes) as little-endian uint64 per chunk, then
the index's crc32c. An encoded chunk is its rows (zstd-compressed where the schema says so) and their crc32c.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import Zstd
from numpy.typing import NDArray

from store.errors import DraftcacheError, ShardDamagedError
from store.files import read_json
from store.schema import CHUNK_ROWS, ArraySpec

_CRC_BYTES = 4
_INDEX_ENTRY = np.dtype([("offset", "<u8"), ("bytes", "<u8")])


def write_arrays(path: Path, arrays: dict[str, NDArray[Any]], specs: dict[str, ArraySpec]) -> int:
    """Write one group of arrays, each in one file; returns the payload bytes before compression.

    Inner chunks that hold only zeros are written too: a chunk that is missing is then always an error.
    """
    import zarr  # readers do without it
    from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
    from zarr.storage import LocalStore

    group = zarr.create_group(LocalStore(path), zarr_format=3)
    written = 0
    for name, spec in specs.items():
        values = arrays[name]
        rows = values.shape[0]
        shard_rows = max(1, -(-rows // CHUNK_ROWS)) * CHUNK_ROWS
        array = group.create_array(
            name,
            shape=values.shape,
            dtype=spec.dtype,
            chunks=(CHUNK_ROWS, *spec.inner),
            shards=(shard_rows, *spec.inner),
            filters=None,
            serializer=BytesCodec(),
            compressors=[ZstdCodec(level=1), Crc32cCodec()] if spec.compress else [Crc32cCodec()],
            config={"write_empty_chunks": True},
        )
        if rows:
            array[...] = np.ascontiguousarray(values, dtype=spec.dtype)
        written += values.nbytes
    return written


class ShardArrays:
    """Reads row ranges of one committed shard, checking the crc32c of every chunk that it touches."""

    def __init__(self, path: Path, specs: dict[str, ArraySpec]) -> None:
        """Check every array's metadata against its spec. Raises ShardDamagedError."""
        self._path = path
        self._specs = specs
        self._rows = {name: self._check_metadata(name, spec) for name, spec in specs.items()}
        self._indexes: dict[str, NDArray[Any]] = {}

    def _check_metadata(self, name: str, spec: ArraySpec) -> int:
        path = self._path / name / "zarr.json"
        try:
            found = read_json(path)
            shape, codec = found["shape"], found["codecs"][0]
            inner = codec["configuration"]
            described = {
                "data_type": found["data_type"],
                "rows": tuple(shape[1:]),
                "chunk_shape": tuple(inner["chunk_shape"]),
                "codecs": [item["name"] for item in inner["codecs"]],
                "index_location": inner.get("index_location", "end"),
            }
        except (DraftcacheError, KeyError, IndexError, TypeError, OSError) as exc:
            raise ShardDamagedError(f"{path}: expected the metadata of a sharded zarr array ({exc!r})") from exc
        expected = {
            "data_type": spec.dtype,
            "rows": spec.inner,
            "chunk_shape": (CHUNK_ROWS, *spec.inner),
            "codecs": ["bytes", *(["zstd"] if spec.compress else []), "crc32c"],
            "index_location": "end",
        }
        if described != expected:
            raise ShardDamagedError(f"{path}: expected {expected}, found {described}")
        return int(shape[0])

    def read(self, name: str, first: int, count: int) -> NDArray[Any]:
        """Rows `first .. first+count` of one array, in memory.

        Raises ShardDamagedError where the array is too short, a chunk is missing, or one fails its checksum.
        """
        spec = self._specs[name]
        if first + count > self._rows[name]:
            raise ShardDamagedError(
                f"{self._path / name}: expected at least {first + count} rows, found {self._rows[name]}"
            )
        if count == 0:
            return np.empty((0, *spec.inner), dtype=spec.dtype)
        chunks = range(first // CHUNK_ROWS, -(-(first + count) // CHUNK_ROWS))
        rows = np.concatenate([self._decode(name, chunk, data) for chunk, data in self._encoded(name, chunks)])
        start = first - chunks[0] * CHUNK_ROWS
        return rows[start : start + count]

    def _encoded(self, name: str, chunks: range) -> list[tuple[int, memoryview]]:
        """The chunks' bytes, by one read of the span that holds them."""
        path = self._file(name)
        try:
            with path.open("rb", buffering=0) as file:
                entries = self._index(name, file.fileno())[chunks.start : chunks.stop]
                low = int(entries["offset"].min())
                high = int((entries["offset"] + entries["bytes"]).max())
                span = memoryview(os.pread(file.fileno(), high - low, low))
        except OSError as exc:
            raise ShardDamagedError(f"{path}: could not be read ({exc})") from exc
        if len(span) != high - low:
            raise ShardDamagedError(f"{path}: expected {high} bytes, found fewer; the file was cut")
        return [
            (chunk, span[int(entry["offset"]) - low : int(entry["offset"] + entry["bytes"]) - low])
            for chunk, entry in zip(chunks, entries, strict=True)
        ]

    def _index(self, name: str, descriptor: int) -> NDArray[Any]:
        if name not in self._indexes:
            chunks = -(-self._rows[name] // CHUNK_ROWS)
            size = chunks * _INDEX_ENTRY.itemsize
            start = os.fstat(descriptor).st_size - size - _CRC_BYTES
            data = os.pread(descriptor, size + _CRC_BYTES, start) if start >= 0 else b""
            if len(data) != size + _CRC_BYTES or not _crc_matches(memoryview(data)):
                raise ShardDamagedError(
                    f"{self._file(name)}: expected an index of {chunks} chunks, its crc32c is wrong"
                )
            index = np.frombuffer(data, _INDEX_ENTRY, chunks)
            # A chunk that was never written has offset and size 2**64 - 1, which ends beyond any file.
            if (index["offset"] > start).any() or (index["bytes"] > start - index["offset"]).any():
                raise ShardDamagedError(f"{self._file(name)}: expected every chunk inside the file, found some outside")
            self._indexes[name] = index
        return self._indexes[name]

    def _decode(self, name: str, chunk: int, data: memoryview) -> NDArray[Any]:
        spec = self._specs[name]
        if not _crc_matches(data):
            raise ShardDamagedError(
                f"{self._file(name)}: rows {chunk * CHUNK_ROWS} to {(chunk + 1) * CHUNK_ROWS} fail their crc32c; "
                "remove the shard's commit record and rerun capture to make it again"
            )
        payload = Zstd().decode(data[:-_CRC_BYTES]) if spec.compress else data[:-_CRC_BYTES]
        return np.frombuffer(payload, np.dtype(spec.dtype).newbyteorder("<")).reshape(CHUNK_ROWS, *spec.inner)

    def _file(self, name: str) -> Path:
        return self._path.joinpath(name, "c", *("0" for _ in range(1 + len(self._specs[name].inner))))


def _crc_matches(data: memoryview) -> bool:
    expected = int.from_bytes(data[-_CRC_BYTES:], "little")
    return len(data) > _CRC_BYTES and google_crc32c.value(bytes(data[:-_CRC_BYTES])) == expected
