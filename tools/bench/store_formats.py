"""What every format of the store benchmark offers, and the two that pack conversations: flat files and zarr-python.

Each is used in the best way that we know for it.

All write the same arrays of the same conversations and give the same values back, in memory that the process owns.
Where a format can fill memory that is there already, it does: `Buffers` holds it, as a training loop would.
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
from draftcache.tools.bench.store_content import Content

Arrays = dict[str, NDArray[Any]]
Window = tuple[int, int, int]
"""Conversation, first token, tokens."""
Span = tuple[int, int]

_AXES = (TOKENS_AXIS, ROWS_AXIS, TEACHER_AXIS)
_INDEX_NAME = "index"


class Buffers:
    """Memory for the longest conversation's arrays, made once and shared by all cases."""

    def __init__(self, content: Content) -> None:
        self._rows = int(content.lengths(TOKENS_AXIS).max())
        self._memory: dict[tuple[str, str], NDArray[Any]] = {}

    def take(self, name: str, spec: ArraySpec, rows: int | None = None) -> NDArray[Any]:
        """Room for `rows` rows of an array, or for as many as there can be; the next `take` gives the same memory."""
        key = name, spec.dtype
        if key not in self._memory:
            self._memory[key] = np.ones((self._rows, *spec.inner), spec.stored_dtype)  # ones, so that pages exist
        return self._memory[key][:rows]


class Case(ABC):
    """One format: writes a content below `root`, reads it whole and in windows, opens it."""

    name: str

    def __init__(self, root: Path, content: Content, buffers: Buffers, *, durable: bool = True) -> None:
        """`durable` False leaves out fsync, where the files are many and writing is not what is measured."""
        self.root, self.content, self.buffers, self.durable = root, content, buffers, durable
        self.codec = tap_codec("bf16", layers=content.layers, hidden_size=content.hidden_size)
        teacher = draft_teacher(draft_vocab_size=content.draft_vocab_size, top_k=content.top_k)
        self.specs = array_specs(codec=self.codec, teacher=teacher)

    @abstractmethod
    def write(self) -> None:
        """Write all conversations, durably, where nothing is yet."""

    @abstractmethod
    def open(self) -> NDArray[np.int64]:
        """Get ready to read any conversation, as the reads below need it; returns the tokens of each."""

    @abstractmethod
    def read(self, number: int) -> Arrays:
        """All arrays of one conversation, in memory that stays as it is until the next read."""

    @abstractmethod
    def read_window(self, number: int, first: int, count: int) -> Arrays:
        """`window_names` of the tokens first .. first + count, the rows and teacher positions among them."""

    def read_all(self) -> Iterator[Arrays]:
        """Every conversation, in order."""
        for number in range(len(self.content.conversations)):
            yield self.read(number)

    def read_windows(self, windows: Sequence[Window]) -> Iterator[Arrays]:
        """Every window, in order."""
        for number, first, count in windows:
            yield self.read_window(number, first, count)

    def expected(self, number: int) -> Arrays:
        """What `read` has to give for a conversation."""
        return self.content.conversations[number].arrays

    @property
    def window_names(self) -> list[str]:
        """What a training step reads: all but the logit of the next token."""
        return [name for name in self.specs if name != "next_token_logit"]

    def bytes(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.root.rglob("*") if path.is_file())

    def close(self) -> None:  # noqa: B027  (most formats keep nothing open)
        """Let go of files."""

    def _into(self, name: str, values: NDArray[Any]) -> NDArray[Any]:
        """A copy in the buffers: what is mapped only is read by this."""
        out = self.buffers.take(name, self.specs[name], values.shape[0])
        np.copyto(out, values)
        return out


def window_spans(first: int, count: int, whole: Callable[[str], NDArray[Any]]) -> dict[str, Span]:
    """Per axis, what of a conversation lies in first .. first + count; `whole` reads one of its small arrays."""
    spans = {TOKENS_AXIS: (first, first + count)}
    for axis, name in ((ROWS_AXIS, "positions"), (TEACHER_AXIS, "teacher_positions")):
        low, high = np.searchsorted(whole(name), (first, first + count))
        spans[axis] = int(low), int(high)
    return spans


class _Packed(Case):
    """Arrays of all conversations one after the other, and a table of where each one's slices are."""

    _slices: NDArray[np.int64]  # [conversations, 3 axes, (first, count)]

    def table(self) -> NDArray[np.int64]:
        """First row and rows of every conversation on every axis."""
        counts = np.stack([self.content.lengths(axis) for axis in _AXES], axis=1)
        return np.stack([np.cumsum(counts, axis=0) - counts, counts], axis=2)

    @abstractmethod
    def rows(self, name: str, first: int, count: int) -> NDArray[Any]:
        """Rows of a packed array."""

    def read(self, number: int) -> Arrays:
        """See Case."""
        return {name: self._part(number, name) for name in self.specs}

    def read_window(self, number: int, first: int, count: int) -> Arrays:
        """See Case."""
        spans = window_spans(first, count, partial(self._part, number))
        return {name: self._part(number, name, spans[self.specs[name].axis]) for name in self.window_names}

    def _part(self, number: int, name: str, span: Span | None = None) -> NDArray[Any]:
        first, count = self._slices[number, _AXES.index(self.specs[name].axis)].tolist()
        low, high = span or (0, count)
        return self.rows(name, first + low, high - low)


class RawPreadv(_Packed):
    """One flat file per array, writev and preadv, nothing checked: the limit."""

    name = "raw-preadv"

    def __init__(self, root: Path, content: Content, buffers: Buffers, *, durable: bool = True) -> None:
        super().__init__(root, content, buffers, durable=durable)
        self._files: dict[str, int] = {}

    def write(self) -> None:
        """See Case."""
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
        """See Case."""
        self._slices = np.load(self.root / _INDEX_NAME)
        lengths: NDArray[np.int64] = self._slices[:, 0, 1]
        return lengths

    def rows(self, name: str, first: int, count: int) -> NDArray[Any]:
        """See _Packed."""
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
        """See Case."""
        while self._files:
            os.close(self._files.popitem()[1])


class ZarrPython(_Packed):
    """zarr-python's own sharding codec, with the chunks, checksums and compression of our layout; one shard."""

    name = "zarr-python"

    def write(self) -> None:
        """See Case. A shard is written by one assignment: in pieces it would be written anew for each."""
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
        """See Case."""
        self._group = zarr.open_group(self.root, mode="r")
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._slices = np.asarray(self._array(_INDEX_NAME)[...])
        lengths: NDArray[np.int64] = self._slices[:, 0, 1]
        return lengths

    def rows(self, name: str, first: int, count: int) -> NDArray[Any]:
        """See _Packed."""
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
    """fsync, unless told that durability is not wanted."""
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
