"""A shard is a zarr v3 group with one `sharding_indexed` file per array, every inner chunk ending in crc32c.

Any zarr v3 reader opens it. bf16 taps are stored as uint16 bit patterns, since zarr has no bfloat16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore

from store.errors import ShardDamagedError
from store.schema import CHUNK_ROWS, ArraySpec


def write_arrays(path: Path, arrays: dict[str, NDArray[Any]], specs: dict[str, ArraySpec]) -> int:
    """Write one group of arrays, each in one file; returns the payload bytes before compression.

    Inner chunks that hold only zeros are written too: a chunk that is missing is then always an error.
    """
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
    """Reads row ranges of one committed shard; crc32c is checked by zarr on every chunk read."""

    def __init__(self, path: Path, specs: dict[str, ArraySpec]) -> None:
        self._path = path
        group = zarr.open_group(LocalStore(path, read_only=True), mode="r", zarr_format=3)
        self._arrays: dict[str, zarr.Array[Any]] = {}
        for name, spec in specs.items():
            array = group.get(name)
            if not isinstance(array, zarr.Array) or array.dtype != np.dtype(spec.dtype):
                raise ShardDamagedError(f"{path}: expected an array {name!r} of {spec.dtype}, found {array!r}")
            if array.shape[1:] != spec.inner:
                raise ShardDamagedError(f"{path}/{name}: expected rows of {spec.inner}, found {array.shape[1:]}")
            self._arrays[name] = array

    def read(self, name: str, first: int, count: int) -> NDArray[Any]:
        """Rows `first .. first+count` of one array, in memory.

        Raises ShardDamagedError where the array is too short or a chunk fails its checksum.
        """
        array = self._arrays[name]
        if first + count > array.shape[0]:
            raise ShardDamagedError(
                f"{self._path}/{name}: expected at least {first + count} rows, found {array.shape[0]}"
            )
        try:
            return np.asarray(array[first : first + count])
        except (ValueError, RuntimeError, OSError) as exc:
            raise ShardDamagedError(
                f"{self._path}/{name}: rows {first} to {first + count} could not be read ({exc}); "
                "capture the shard again: remove its commit record and rerun the same capture command"
            ) from exc
