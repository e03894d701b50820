"""A shard as a webdataset tar file: one sample per conversation, with an index of its members beside it.

The members of a sample are, in order, `KEY.json` (index fields, and the xxh3-128 of every other member), then
`KEY.<array>.npy`, or `KEY.<array>.npy.zst` where the schema compresses. KEY is `<split>-<dataset index>`. Any tar or
webdataset reader opens the file; `tar_samples` reads it from front to back and checks every hash. `members.npy` holds
each member's offset, bytes and crc32c, so that `TarShard` reads single conversations at random, as from a zarr shard.
It always reads whole members, because a part of a member has no checksum.
"""

from __future__ import annotations

import io
import tarfile
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from awscrt.checksums import crc32c
from numcodecs import Zstd
from numpy.typing import NDArray

from draftcache.store.common.errors import ShardDamagedError
from draftcache.store.common.files import Buffer, canonical_json, hash_bytes
from draftcache.store.format.array_spec import COUNT_FIELD, ArraySpec
from draftcache.store.format.commits import Record, open_committed, read_committed
from draftcache.store.format.index import load_npy, npy_bytes
from draftcache.store.format.schema import Conversation
from draftcache.store.layouts.shard_files import PARALLEL_BYTES, Files, HashedFile, run_later, run_now, write_small_file
from draftcache.store.storage.asking import ask_again
from draftcache.store.storage.base import RangeFile, Stage, Storage

DATA_NAME = "data.tar"
MEMBERS_NAME = "members.npy"
_ZSTD = Zstd(level=1)
_MEMBER = [("offset", "<u8"), ("bytes", "<u8"), ("crc32c", "<u4")]


def _members_dtype(arrays: int) -> np.dtype[Any]:
    """Return the dtype of a row of members.npy: one conversation's first token in the shard, and its members."""
    return np.dtype([("first_token", "<i8"), ("members", _MEMBER, (arrays,))])


def sample_key(item: Conversation) -> str:
    """Return the key of a conversation's sample, with the split's number first: keys sort as the dataset does."""
    return f"{item.split:02d}-{item.dataset_index:09d}"


def member_suffix(name: str, spec: ArraySpec) -> str:
    """Return the end of an array's member name, which follows the key and a dot."""
    return f"{name}.npy.zst" if spec.compress else f"{name}.npy"


def tar_header(name: str, size: int) -> bytes:
    """Return the POSIX ustar header of a regular file of `size` bytes.

    It has no time and no owner, so that equal content gives equal bytes.
    """
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


def _npy_header(values: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, np.lib.format.header_data_from_array_1_0(values))
    return buffer.getvalue()


class _Payload(NamedTuple):
    """The content of a member: its bytes in parts, and their hash and checksum."""

    parts: list[Buffer]
    xxh3_128: str
    crc32c: int


def _payload(spec: ArraySpec, values: NDArray[Any]) -> _Payload:
    values = np.ascontiguousarray(values, spec.stored_dtype)
    parts: list[Buffer] = [_npy_header(values), values.reshape(-1).view(np.uint8).data]
    if spec.compress:
        parts = [_ZSTD.encode(b"".join(parts))]
    crc = 0
    for part in parts:
        crc = crc32c(np.frombuffer(part, np.uint8), crc)
    return _Payload(parts, hash_bytes(*parts), crc)


class TarShardWriter:
    """Writes one tar file, sample by sample. Implements `ShardWriter`."""

    def __init__(self, stage: Stage, specs: dict[str, ArraySpec]) -> None:
        self._stage = stage
        self._specs = specs
        self._file = HashedFile(stage.open(DATA_NAME))
        self._rows: list[NDArray[Any]] = []
        self._tokens = 0

    def append(self, item: Conversation) -> None:
        key = sample_key(item)
        run = run_now if item.nbytes >= PARALLEL_BYTES else run_later
        making = {name: run(partial(_payload, spec, item.arrays[name])) for name, spec in self._specs.items()}
        payloads = {name: made() for name, made in making.items()}
        suffixes = {name: member_suffix(name, spec) for name, spec in self._specs.items()}
        about = {
            "content_hash": item.content_hash,
            "split": item.split,
            "dataset_index": item.dataset_index,
            "xxh3_128": {suffixes[name]: payload.xxh3_128 for name, payload in payloads.items()},
        }
        self._member(f"{key}.json", [canonical_json(about).encode()])
        row = np.zeros(1, _members_dtype(len(self._specs)))
        row["first_token"] = self._tokens
        for number, (name, payload) in enumerate(payloads.items()):
            row["members"][0, number] = (*self._member(f"{key}.{suffixes[name]}", payload.parts), payload.crc32c)
        self._rows.append(row)
        self._tokens += item.arrays["token_ids"].shape[0]

    def _member(self, name: str, parts: list[Buffer]) -> tuple[int, int]:
        """Append one member. Returns the offset and the bytes of its payload."""
        size = sum(memoryview(part).nbytes for part in parts)
        header = tar_header(name, size)
        offset = self._file.bytes + len(header)
        out: list[Buffer] = [header, *parts, bytes(-size % tarfile.BLOCKSIZE)]
        self._file.write(out)
        return offset, size

    def close(self) -> Files:
        """End the archive and write members.npy."""
        self._file.write([bytes(2 * tarfile.BLOCKSIZE)])
        table = np.concatenate(self._rows) if self._rows else np.empty(0, _members_dtype(len(self._specs)))
        return {
            DATA_NAME: self._file.close(),
            MEMBERS_NAME: write_small_file(self._stage, MEMBERS_NAME, npy_bytes(table)),
        }


def read_members(storage: Storage, record: Record, specs: dict[str, ArraySpec]) -> NDArray[Any]:
    """Return the table of members of one committed tar shard: a row per conversation, of `_members_dtype`.

    Its hash is in the commit record, and so its checksums tell this shard's members from those of any other. Raises
    ShardDamagedError where it is not as committed.
    """
    name = f"{record['directory']}/{MEMBERS_NAME}"
    where = storage.describe(name)
    table = load_npy(read_committed(storage, record, name), where)
    expected = (_members_dtype(len(specs)), (record["conversations"],))
    if (table.dtype, table.shape) != expected:
        raise ShardDamagedError(
            f"{where}: expected members of {record['conversations']} conversations of {len(specs)} arrays each, found "
            f"a table {table.shape} of {table.dtype}; run `draftcache repair` on the store, then the capture command "
            "again"
        )
    size = int(record["files"][f"{record['directory']}/{DATA_NAME}"]["bytes"])
    members = table["members"]
    if ((members["bytes"] > size) | (members["offset"] > size - members["bytes"])).any():
        raise ShardDamagedError(f"{where}: expected members inside the {size} bytes of {DATA_NAME}, found others")
    return table


class TarShard:
    """Reads single conversations of one committed tar shard. Implements `ShardReader`."""

    whole_arrays = True

    def __init__(self, storage: Storage, record: Record, specs: dict[str, ArraySpec]) -> None:
        self._storage = storage
        self._specs = specs
        self._numbers = {name: number for number, name in enumerate(specs)}
        self._name = f"{record['directory']}/{DATA_NAME}"
        self._table = read_members(storage, record, specs)
        self._file: RangeFile = open_committed(storage, record, self._name)

    def close(self) -> None:
        self._file.close()

    def read(self, row: np.void, name: str, first: int, count: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Read rows of one conversation's array. The whole member is read, because its crc32c covers the whole."""
        spec = self._specs[name]
        rows = int(row[COUNT_FIELD[spec.axis]])
        if out is None:
            out = np.empty((count, *spec.inner), spec.stored_dtype)
        whole = out if count == rows else np.empty((rows, *spec.inner), spec.stored_dtype)
        ask_again(self._storage, lambda: self._read_member(row, name, whole.reshape(-1).view(np.uint8)))
        if whole is not out:
            out[:] = whole[first : first + count]
        return out

    def _read_member(self, row: np.void, name: str, out: NDArray[np.uint8]) -> None:
        """Fill `out` with the array that a whole member holds."""
        sample = int(np.searchsorted(self._table["first_token"], row["first_token"]))
        self._require(name, sample < len(self._table) and self._table["first_token"][sample] == row["first_token"], row)
        offset, size, crc = (int(value) for value in self._table["members"][sample, self._numbers[name]])
        if self._specs[name].compress:
            encoded = np.empty(size, np.uint8)
            self._file.read_into(offset, [encoded.data])
            self._require(name, crc32c(encoded) == crc, row)
            try:
                data = np.frombuffer(_ZSTD.decode(encoded), np.uint8)
            except (RuntimeError, ValueError) as exc:
                raise self._damaged(name, row) from exc
            self._require(name, data.nbytes >= out.nbytes, row)
            out[:] = data[data.nbytes - out.nbytes :]
            return
        header = np.empty(max(size - out.nbytes, 0), np.uint8)
        self._require(name, header.nbytes + out.nbytes == size, row)
        self._file.read_into(offset, [header.data, out.data])
        self._require(name, crc32c(out, crc32c(header)) == crc, row)

    def _require(self, name: str, holds: bool, row: np.void) -> None:
        if not holds:
            raise self._damaged(name, row)

    def _damaged(self, name: str, row: np.void) -> ShardDamagedError:
        return ShardDamagedError(
            f"{self._storage.describe(self._name)}: {name} of conversation {row['content_hash'].tobytes().hex()} "
            "fails its crc32c; run `draftcache repair` on the store, then the capture command again"
        )
