"""The files of a zarr shard: a zarr v3 group with one `sharding_indexed` file per array, whose chunks end in crc32c.

Any zarr v3 reader opens the group. bf16 taps are stored as bit patterns, since zarr has no bfloat16.

The file of an array holds its encoded inner chunks, then an index of (offset, bytes) as little-endian uint64 per chunk,
then the index's crc32c. An encoded chunk is its rows, zstd-compressed where the schema says so, followed by the crc32c
of these bytes.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from draftcache.store.format.array_spec import ArraySpec

CRC_BYTES = 4
INDEX_ENTRY = np.dtype([("offset", "<u8"), ("bytes", "<u8")])
METADATA = "zarr.json"
END_HASH = "end_xxh3_128"
"""Field of an array file's entry in a commit record: the hash of the file's end, which is the crc32c of the last chunk,
the index of the chunks and its crc32c. A reader reads the index anyway, and so knows the file by its content. Files
that an older draftcache wrote have no such field."""


def data_file(name: str, spec: ArraySpec) -> str:
    """Return the name of an array's one file, relative to the shard."""
    return f"{name}/c.{'.'.join('0' * (1 + len(spec.inner)))}"


def node(kind: str) -> dict[str, Any]:
    """Return the fields that every zarr.json begins with."""
    return {"zarr_format": 3, "node_type": kind}


def json_bytes(value: dict[str, Any]) -> bytes:
    """Return the bytes of a zarr.json."""
    return (json.dumps(value, indent=2) + "\n").encode()


def array_metadata(spec: ArraySpec, rows: int) -> dict[str, Any]:
    """Return the zarr.json of an array of `rows` rows in one shard.

    The format is zarr v3 core with the sharding-indexed codec 1.0.
    """
    to_bytes: dict[str, Any] = {"name": "bytes"}
    if np.dtype(spec.dtype).itemsize > 1:
        to_bytes["configuration"] = {"endian": "little"}
    crc: dict[str, Any] = {"name": "crc32c"}
    zstd = {"name": "zstd", "configuration": {"level": 1, "checksum": False}}
    inner = {
        "chunk_shape": [spec.chunk_rows, *spec.inner],
        "codecs": [to_bytes, *([zstd] if spec.compress else []), crc],
        "index_codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, crc],
        "index_location": "end",
    }
    shard_rows = max(1, -(-rows // spec.chunk_rows)) * spec.chunk_rows
    return node("array") | {
        "shape": [rows, *spec.inner],
        "data_type": spec.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_rows, *spec.inner]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0,
        "codecs": [{"name": "sharding_indexed", "configuration": inner}],
        "attributes": {},
        "storage_transformers": [],
    }
