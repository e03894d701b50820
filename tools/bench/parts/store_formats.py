"""The interface of every format in the store benchmark, and the formats that pack conversations: flat files and zarr.

Each format is used in the best way that we know for it. All of them write the same arrays of the same conversations
and return the same values, in memory that the process owns. A format that can fill existing memory does so: `Buffers`
holds this memory, as a training loop would.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer.cpu import NDBuffer

from draftcache.store.common.files import fsync_directory, fsync_tree
from draftcache.store.format.array_spec import ROWS_AXIS, TEACHER_AXIS, TOKENS_AXIS, ArraySpec
from draftcache.store.format.schema import array_specs
from draftcache.store.format.tap_codecs import tap_codec
from draftcache.store.format.teacher import draft_teacher
from draftcache.tools.bench.parts.store_content import Content

Arrays = dict[str, NDArray[Any]]
Window = tuple[int, int, int]
"""The number of a conversation, the position of the first token, and the number of tokens."""
Span = tuple[int, int]
"""The first row of a slice, and the row after its last."""

_AXES = (TOKENS_AXIS, ROWS_AXIS, TEACHER_AXIS)
_INDEX_NAME = "index"


class Buffers:
    """Memory for the longest conversation's arrays, allocated once and shared by all cases."""

    def __init__(self, content: Content) -> None:
        self._rows = int(content.lengths(TOKENS_AXIS).max())
        self._memory: dict[tuple[str, str], NDArray[Any]] = {}

    def take(self, name: str, spec: ArraySpec, rows: int | None = None) -> NDArray[Any]:
        """Return memory for `rows` rows of an array (default: as many as fit). The next call returns it again."""
        key = name, spec.dtype
        if key not in self._memory:
            # Ones instead of zeros make the kernel allocate the pages now.
            self._memory[key] = np.ones((self._rows, *spec.inner), spec.stored_dtype)
        return self._memory[key][:rows]


class Case(ABC):
    """One format: it writes a content below `root`, opens it, and reads it whole and in windows.

    `durable` False leaves out fsync, for the case of many files whose writing is not measured.
    """

    name: str

    def __init__(self, root: Path, content: Content, buffers: Buffers, *, durable: bool = True) -> None:
        self.root, self.content, self.buffers, self.durable = root, content, buffers, durable
        self.codec = tap_codec("bf16", layers=content.layers, hidden_size=content.hidden_size)
        teacher = draft_teacher(draft_vocab_size=content.draft_vocab_size, top_k=content.top_k)
        self.specs = array_specs(codec=self.codec, teacher=teacher)

    @abstractmethod
    def write(self) -> None:
        """Write all conversations durably. `root` does not exist yet."""

    @abstractmethod
    def open(self) -> NDArray[np.int64]:
        """Do what reading any conversation requires beforehand; return the number of tokens of each, [N] int64."""

    @abstractmethod
    def read(self, number: int) -> Arrays:
        """Return all arrays of one conversation, in memory that stays unchanged until the next read."""

    @abstractmethod
    def read_window(self, number: int, first: int, count: int) -> Arrays:
        """Return the arrays `window_names` of `count` tokens from `first`, with their rows and teacher positions."""

    def read_all(self) -> Iterator[Arrays]:
        """Yield every conversation, in order."""
        for number in range(len(self.content.conversations)):
            yield self.read(number)

    def read_windows(self, windows: Sequence[Window]) -> Iterator[Arrays]:
        """Yield every window, in order."""
        for number, first, count in windows:
            yield self.read_window(number, first, count)

    def expected(self, number: int) -> Arrays:
        """Return the arrays that `read` has to return for a conversation."""
        return self.content.conversations[number].arrays

    @property
    def window_names(self) -> list[str]:
        """The arrays that a training step reads: all but the logit of the next token."""
        return [name for name in self.specs if name != "next_token_logit"]

    def bytes(self) -> int:
        """Return the bytes of all files."""
        return sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())

    def close(self) -> None:  # noqa: B027  (most formats keep nothing open)
        """Close the files that `open` and the reads opened."""

    def _into(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        """Return a copy of `values` in the buffers. Copying is what reads the pages of a mapped file."""
        out = self.buffers.take(name, self.specs[name], values.shape[0])
        np.copyto(out, values)
        return out


def window_spans(first: int, count: int, whole: Callable[[str], NDArray[Any]]) -> dict[str, Span]:
    """Return by axis the span of a conversation's rows in a window of `count` tokens from `first`.

    `whole` reads one of the conversation's small arrays by name.
    """
    spans = {TOKENS_AXIS: (first, first + count)}
    for axis, name in ((ROWS_AXIS, "positions"), (TEACHER_AXIS, "teacher_positions")):
        low, high = np.searchsorted(whole(name), (first, first + count))
        spans[axis] = int(low), int(high)
    return spans


class _Packed(Case):
    """A format that concatenates the arrays of all conversations and keeps a table of each conversation's slices."""

    _slices: NDArray[np.int64]  # [conversations, 3 axes, (first, count)]

    def table(self) -> NDArray[np.int64]:
        """Return the first row and the number of rows of every conversation on every axis, [N, 3, 2]."""
        counts = np.stack([self.content.lengths(axis) for axis in _AXES], axis=1)
        return np.stack([np.cumsum(counts, axis=0) - counts, counts], axis=2)

    @abstractmethod
    def rows(self, name: str, first: int, count: int) -> NDArray[Any]:
        """Read `count` rows of a concatenated array, from row `first` on."""

    def read(self, number: int) -> Arrays:
        return {name: self._part(number, name) for name in self.specs}

    def read_window(self, number: int, first: int, count: int) -> Arrays:
        spans = window_spans(first, count, partial(self._part, number))
        return {name: self._part(number, name, spans[self.specs[name].axis]) for name in self.window_names}

    def _part(self, number: int, name: str, span: Span | None = None) -> NDArray[Any]:
        first, count = self._slices[number, _AXES.index(self.specs[name].axis)].tolist()
        low, high = span or (0, count)
        return self.rows(name, first + low, high - low)


class RawPreadv(_Packed):
    """Implements `Case` by one flat file per array, written by writev and read by preadv without any check.

    It shows the limit of the disk and the memory.
    """

    name = "raw-preadv"

    def __init__(self, root: Path, content: Content, buffers: Buffers, *, durable: bool = True) -> None:
        super().__init__(root, content, buffers, durable=durable)
        self._files: dict[str, int] = {}

    def write(self) -> None:
        self.root.mkdir(parents=True)
        for name in self.specs:
            pieces = [_bytes(item.arrays[name]) for item in self.content.conversations]
            with (self.root / name).open("wb", buffering=0) as file:
                for first in range(0, len(pieces), os.sysconf("SC_IOV_MAX")):
                    _write_fully(file.fileno(), pieces[first : first + os.sysconf("SC_IOV_MAX")])
                sync(file, self.durable)
        with (self.root / _INDEX_NAME).open("wb") as file:
            np.save(file, self.table())
            sync(file, self.durable)
        fsync_directory(self.root)

    def open(self) -> NDArray[np.int64]:
        self._slices = np.load(self.root / _INDEX_NAME)
        lengths: NDArray[np.int64] = self._slices[:, 0, 1]
        return lengths

    def rows(self, name: str, first: int, count: int) -> NDArray[Any]:
        if name not in self._files:
            self._files[name] = os.open(self.root / name, os.O_RDONLY)
        spec = self.specs[name]
        out = self.buffers.take(name, spec, count)
        view, offset = _bytes(out), first * spec.row_bytes
        while view.nbytes:
            got = os.preadv(self._files[name], [view], offset)
            if not got:
                raise EOFError(f"{self.root / name}: expected {view.nbytes} bytes at {offset}, found the end")
            view, offset = view[got:], offset + got
        return out

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


class ZarrPython(_Packed):
    """Implements `Case` by zarr-python's sharding codec, with our layout's chunks, checksums and compression.

    The store has one shard.
    """

    name = "zarr-python"

    def write(self) -> None:
        """Write each shard by one assignment, because every further assignment would write the whole shard again."""
        group = zarr.create_group(self.root)
        for name, spec in self.specs.items():
            values = self.content.packed(name)
            shard_rows = max(1, -(-len(values) // spec.chunk_rows)) * spec.chunk_rows
            array = group.create_array(
                name,
                shape=values.shape,
                dtype=values.dtype,
                chunks=(spec.chunk_rows, *spec.inner),
                shards=(shard_rows, *spec.inner),
                filters=None,
                compressors=(*([ZstdCodec(level=1)] if spec.compress else []), Crc32cCodec()),
                config={"write_empty_chunks": True},
            )
            array[...] = values
        group.create_array(_INDEX_NAME, data=self.table(), compressors=(Crc32cCodec(),))
        if self.durable:
            fsync_tree(self.root)

    def open(self) -> NDArray[np.int64]:
        self._group = zarr.open_group(self.root, mode="r")
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._slices = np.asarray(self._array(_INDEX_NAME)[...])
        lengths: NDArray[np.int64] = self._slices[:, 0, 1]
        return lengths

    def rows(self, name: str, first: int, count: int) -> NDArray[Any]:
        out = self.buffers.take(name, self.specs[name], count)
        if count:
            self._array(name).get_basic_selection(slice(first, first + count), out=NDBuffer.from_numpy_array(out))
        return out

    def _array(self, name: str) -> zarr.Array[Any]:
        if name not in self._arrays:
            array = self._group[name]
            assert isinstance(array, zarr.Array)
            self._arrays[name] = array
        return self._arrays[name]


def _bytes(values: NDArray[Any]) -> memoryview:
    return values.reshape(-1).view(np.uint8).data


def sync(file: Any, durable: bool) -> None:
    """Flush and fsync a file, unless `durable` is False."""
    if durable:
        file.flush()
        os.fsync(file.fileno())


def _write_fully(descriptor: int, pieces: list[memoryview]) -> None:
    while pieces:
        done = os.writev(descriptor, pieces)
        while pieces and done >= pieces[0].nbytes:
            done -= pieces.pop(0).nbytes
        if done:
            pieces[0] = pieces[0][done:]
