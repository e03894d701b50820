"""Reads a tar shard from front to back, sample by sample, with every member's xxh3-128 checked.

`tar_shards` describes the format. Members come from a file that anyone may have written: names, types, order and sizes
are checked, and nothing is unpickled or extracted to a disk.
"""

from __future__ import annotations

import io
import re
import tarfile
import time
from collections.abc import Iterator
from typing import IO, Any, cast

import numpy as np
from awscrt.checksums import crc32c
from numcodecs import Zstd
from numpy.typing import NDArray

from draftcache.store.common.errors import ShardDamagedError
from draftcache.store.common.files import hash_bytes
from draftcache.store.common.strict_json import parse_json
from draftcache.store.format.array_spec import ArraySpec
from draftcache.store.format.commits import Record, open_committed
from draftcache.store.format.index import load_npy
from draftcache.store.format.schema import Conversation
from draftcache.store.layouts.tar_shards import DATA_NAME, member_suffix, read_members
from draftcache.store.storage.base import RangeFile, Storage

_MEMBER = re.compile(r"(?P<key>[0-9]{2,}-[0-9]{9,})\.(?P<suffix>json|[a-z0-9_]+\.npy(\.zst)?)")
_READ_AHEAD = 1 << 23
_LARGEST_JSON = 1 << 20
_ZSTD = Zstd(level=1)
_EXCHANGED = "another shard's file took its place: put the right one back, or run `draftcache repair` on the store"


def read_tar(
    storage: Storage, record: Record, specs: dict[str, ArraySpec], index: NDArray[Any]
) -> Iterator[Conversation]:
    """Yield the conversations of one committed tar shard in order, with their arrays as they are stored.

    `index` holds the shard's index rows. Raises ShardDamagedError unless the members are regular files of the names,
    order, sizes and hashes of whole samples, and nothing else; and unless they are those of the index and of the
    committed table of members, because a tar file of another shard is whole as well.
    """
    table = read_members(storage, record, specs)["members"]
    if len(index) != len(table):
        raise ShardDamagedError(
            f"{storage.describe(record['directory'])}: expected the index's {len(index)} conversations, found "
            f"{len(table)}; {_EXCHANGED}"
        )
    done = 0
    pauses = list(storage.pauses)
    while True:
        try:
            for item in _read_from(storage, record, specs, index, table, done):
                done, pauses = done + 1, list(storage.pauses)
                yield item
            return
        except ShardDamagedError:
            # An object store's answer can be damaged on its way: the sample is read again before the shard is blamed.
            if not pauses:
                raise
            time.sleep(pauses.pop(0))


def _read_from(
    storage: Storage,
    record: Record,
    specs: dict[str, ArraySpec],
    index: NDArray[Any],
    table: NDArray[Any],
    first: int,
) -> Iterator[Conversation]:
    """Yield the conversations from number `first` of the shard on. `table` holds the members [conversations, arrays].

    Raises ShardDamagedError.
    """
    name, found = f"{record['directory']}/{DATA_NAME}", first
    where = storage.describe(name)
    file = open_committed(storage, record, name)
    stream = cast("IO[bytes]", _Stream(file, _end_of_sample(table, first)))
    try:
        with tarfile.open(fileobj=stream, mode="r|", bufsize=_READ_AHEAD) as tar:
            members = _checked_members(tar, where)
            for key, suffix, data in members:
                if suffix != "json":
                    raise ShardDamagedError(f"{where}: expected {key}.json first in its sample, found {key}.{suffix}")
                item, crcs = _sample(specs, where, key, data, members)
                if found < len(table):
                    _require_place(item, crcs, index[found], table[found], f"{where}: {key}")
                found += 1
                yield item
    except (tarfile.TarError, EOFError) as exc:
        raise ShardDamagedError(f"{where}: expected a whole tar file, could not read on ({exc})") from exc
    finally:
        file.close()
    if found != record["conversations"]:
        raise ShardDamagedError(f"{where}: expected {record['conversations']} samples, found {found}")


def _end_of_sample(table: NDArray[Any], number: int) -> int:
    """Return the offset at which the first `number` samples of a tar file end."""
    if not number:
        return 0
    offset, size = (int(table[number - 1, -1][field]) for field in ("offset", "bytes"))
    return offset + size + -size % tarfile.BLOCKSIZE


def _checked_members(tar: tarfile.TarFile, where: str) -> Iterator[tuple[str, str, bytes]]:
    """Yield the key, suffix and bytes of each member. Raises ShardDamagedError for a member that no sample has."""
    for info in tar:
        match = _MEMBER.fullmatch(info.name)
        if match is None or not info.isreg() or info.issparse():
            raise ShardDamagedError(
                f"{where}: refused member {info.name!r}: expected a regular file named KEY.json or KEY.ARRAY.npy"
            )
        if match["suffix"] == "json" and info.size > _LARGEST_JSON:
            raise ShardDamagedError(f"{where}: refused member {info.name!r}: expected at most 1 MiB of JSON")
        extracted = tar.extractfile(info)
        assert extracted is not None, "a regular file has content"
        data = extracted.read()
        if len(data) != info.size:
            raise ShardDamagedError(
                f"{where}: expected {info.size} bytes of {info.name}, found {len(data)}; it was cut"
            )
        yield match["key"], match["suffix"], data


def _sample(
    specs: dict[str, ArraySpec], where: str, key: str, about_json: bytes, members: Iterator[tuple[str, str, bytes]]
) -> tuple[Conversation, list[int]]:
    """Return the conversation of a sample, whose arrays are the next of `members`, and the crc32c of each member.

    Raises ShardDamagedError.
    """
    try:
        about = parse_json(about_json)
        hashes = {suffix: str(value) for suffix, value in about["xxh3_128"].items()}
        identity = str(about["content_hash"]), int(about["split"]), int(about["dataset_index"])
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise ShardDamagedError(f"{where}: {key}.json: expected a sample's description, found something else") from exc
    arrays: dict[str, NDArray[Any]] = {}
    crcs = []
    for name, spec in specs.items():
        expected = member_suffix(name, spec)
        found_key, suffix, data = next(members, ("", "nothing", b""))
        if (found_key, suffix) != (key, expected):
            raise ShardDamagedError(f"{where}: expected member {key}.{expected} next, found {found_key}.{suffix}")
        if hash_bytes(data) != hashes.get(suffix):
            raise ShardDamagedError(f"{where}: {key}.{suffix}: expected xxh3-128 {hashes.get(suffix)}, found another")
        arrays[name] = _array(data, spec, f"{where}: {key}.{suffix}")
        crcs.append(crc32c(np.frombuffer(data, np.uint8)))
    content_hash, split, dataset_index = identity
    return Conversation(content_hash=content_hash, split=split, dataset_index=dataset_index, arrays=arrays), crcs


def _require_place(item: Conversation, crcs: list[int], row: np.void, members: NDArray[Any], where: str) -> None:
    """Raise ShardDamagedError unless a sample is the conversation of an index row and has the committed members."""
    expected = row["content_hash"].tobytes().hex(), int(row["split"]), int(row["dataset_index"])
    found = item.content_hash, item.split, item.dataset_index
    if found != expected:
        raise ShardDamagedError(f"{where}: expected conversation {expected} of the index, found {found}; {_EXCHANGED}")
    if crcs != members["crc32c"].tolist():
        raise ShardDamagedError(f"{where}: expected members of the committed checksums, found others; {_EXCHANGED}")


def _array(data: bytes, spec: ArraySpec, where: str) -> NDArray[Any]:
    """Return a member's array. Nothing is unpickled: object arrays are refused by their dtype."""
    try:
        plain = _ZSTD.decode(data) if spec.compress else data
    except (ValueError, RuntimeError) as exc:
        raise ShardDamagedError(f"{where}: expected a .npy array, could not decompress it ({exc})") from exc
    array = load_npy(plain, where)
    if array.dtype != spec.stored_dtype or array.shape[1:] != spec.inner:
        raise ShardDamagedError(
            f"{where}: expected {spec.dtype} rows of {spec.inner}, found {array.dtype} {array.shape}"
        )
    return array


class _Stream(io.RawIOBase):
    """A committed file in the form that tarfile reads, forward only."""

    def __init__(self, file: RangeFile, offset: int) -> None:
        self._file, self._offset = file, offset

    def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes; all that are left for a negative size."""
        count = min(size if size >= 0 else self._file.size, self._file.size - self._offset)
        data = bytearray(count)
        self._file.read_into(self._offset, [memoryview(data)])
        self._offset += count
        return bytes(data)
