"""The description of one stored array, and the names of axes, index fields and taps.

Every array of a shard lies along one of three axes, packed flat over the shard's conversations: tokens, rows of states,
or teacher positions. `schema` lists the arrays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftcache.store.common.errors import InputError

CHUNK_ROWS = 256
"""Rows of one inner chunk of a tap: the unit that is read and checksummed. Narrower arrays have longer chunks."""

_CHUNK_BYTES = 1 << 16
_MOST_CHUNK_ROWS = 4096

TOKENS_AXIS, ROWS_AXIS, TEACHER_AXIS = "tokens", "rows", "teacher"
FIRST_FIELD = {TOKENS_AXIS: "first_token", ROWS_AXIS: "first_row", TEACHER_AXIS: "first_teacher"}
"""By axis, the index field that holds the offset of a conversation's slice within its shard."""
COUNT_FIELD = {TOKENS_AXIS: "tokens", ROWS_AXIS: "rows", TEACHER_AXIS: "teacher_rows"}
"""By axis, the index field that holds the length of a conversation's slice."""
LENGTH_ARRAY = {TOKENS_AXIS: "token_ids", ROWS_AXIS: "positions", TEACHER_AXIS: "teacher_positions"}
"""By axis, an array that every store holds on it: its length is the length of the slice."""


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """The axis, row shape and dtype of one stored array, and whether its values are worth compressing."""

    axis: str
    """The axis that the array is packed along: `TOKENS_AXIS`, `ROWS_AXIS` or `TEACHER_AXIS`."""
    dtype: str
    """NumPy's name of the dtype, without a byte order."""
    inner: tuple[int, ...] = ()
    """Shape of one row, which is the array's shape after the packed axis."""
    compress: bool = True
    """Whether chunks are compressed with zstd."""

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """The dtype in little-endian byte order, as files hold it."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def chunk_rows(self) -> int:
        """Rows of one inner chunk: a power of two that makes up to 64 KiB, but at least 256 and at most 4,096."""
        fitting = 1 << max(_CHUNK_BYTES // self.row_bytes, 1).bit_length() - 1
        return min(max(fitting, CHUNK_ROWS), _MOST_CHUNK_ROWS)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row before compression."""
        return math.prod(self.inner) * np.dtype(self.dtype).itemsize


def tap_name(layer: int) -> str:
    """Return the array name of the output of block `layer`."""
    return f"tap_{layer}"


def id_dtype(vocab_size: int) -> str:
    """Return the dtype of ids below `vocab_size`: two bytes are enough for up to 65,536 entries."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def require_shapes(arrays: Mapping[str, NDArray[Any]], specs: Mapping[str, ArraySpec]) -> None:
    """Raise InputError unless each array of one conversation has the rows of its axis, of its spec's shape.

    An array of another shape could be written, and never be read.
    """
    lengths = {axis: len(arrays[name]) for axis, name in LENGTH_ARRAY.items()}
    for name, spec in specs.items():
        expected, found = (lengths[spec.axis], *spec.inner), arrays[name].shape
        if found != expected:
            raise InputError(f"{name}: expected an array of shape {list(expected)}, found {list(found)}")
