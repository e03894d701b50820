"""The reader's choice of rows: which rows of a conversation's slices a read needs, and how it fetches them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from draftcache.store.common.errors import InputError
from draftcache.store.format.array_spec import COUNT_FIELD, ROWS_AXIS, TEACHER_AXIS, TOKENS_AXIS, ArraySpec
from draftcache.store.format.rows import rows_in_reach
from draftcache.store.layouts.registry import ShardReader

Selection: TypeAlias = NDArray[np.int64] | slice
"""Offsets of rows within a conversation's slice: [n] int64 ascending, or a slice without gaps."""


class ConversationArrays:
    """The arrays of one conversation in an open shard. What has been read whole is kept, and not read again."""

    def __init__(self, shard: ShardReader, row: np.void) -> None:
        """`row` is the conversation's index row."""
        self.shard, self.row = shard, row
        self._held: dict[str, NDArray[Any]] = {}

    def whole(self, name: str, spec: ArraySpec) -> NDArray[Any]:
        """Return an array's whole slice, [rows, *inner]."""
        if name not in self._held:
            self._held[name] = self.shard.read(self.row, name, 0, int(self.row[COUNT_FIELD[spec.axis]]))
        return self._held[name]

    def holds(self, name: str) -> bool:
        """Return whether an array was read whole before."""
        return name in self._held


def select_rows(
    arrays: ConversationArrays,
    specs: Mapping[str, ArraySpec],
    axes: set[str],
    *,
    tokens: tuple[int, int] | None,
    window: int | None,
    stored_window: int | None,
    where: str,
) -> dict[str, Selection]:
    """Return which rows to read of one conversation's slices, by axis. See `StoreReader.read`.

    `specs` describes every array by name. Only for `axes` are positions read from the shard to find the rows.
    `stored_window` is the store's window, which `window` must not exceed. Raises InputError, which names `where`, for a
    token range or a window that the store does not hold.
    """
    row = arrays.row
    selected: dict[str, Selection] = {
        axis: slice(0, int(row[COUNT_FIELD[axis]])) for axis in (TOKENS_AXIS, ROWS_AXIS, TEACHER_AXIS)
    }
    if tokens is None and window is None:
        return selected
    length = int(row["tokens"])
    first, last = tokens or (0, length)
    if not 0 <= first <= last <= length:
        raise InputError(f"{where}: expected a token range inside 0 .. {length}, found {first} .. {last}")
    selected[TOKENS_AXIS] = slice(first, last)
    if TEACHER_AXIS in axes:
        positions = arrays.whole("teacher_positions", specs["teacher_positions"])
        selected[TEACHER_AXIS] = _between(positions, first, last)
    if ROWS_AXIS in axes:
        positions = arrays.whole("positions", specs["positions"])
        if window is None:
            selected[ROWS_AXIS] = _between(positions, first, last)
        else:
            if stored_window is not None and window > stored_window:
                raise InputError(
                    f"{where}: expected a window of at most {stored_window}, found {window}; rows beyond it were not "
                    "stored"
                )
            loss_mask = arrays.whole("loss_mask", specs["loss_mask"]).astype(np.bool_)
            selected[ROWS_AXIS] = np.searchsorted(positions, rows_in_reach(loss_mask, window, (first, last)))
    return selected


def _between(positions: NDArray[Any], first: int, last: int) -> slice:
    """Return the slice of ascending positions that are at least `first` and below `last`."""
    return slice(*(int(edge) for edge in np.searchsorted(positions, (first, last))))


def read_rows(
    arrays: ConversationArrays, name: str, spec: ArraySpec, selection: Selection, out: NDArray[Any] | None
) -> NDArray[Any]:
    """Return the selected rows of one conversation's slice of the array `name`.

    The result [n, *inner] has the stored dtype, and is a view of `out` where that is given. Raises ShardDamagedError.
    """
    shard, row = arrays.shard, arrays.row
    if isinstance(selection, slice):
        count = selection.stop - selection.start
        target = None if out is None else out[:count]
        if not arrays.holds(name):
            return shard.read(row, name, selection.start, count, target)
        return _copied(arrays.whole(name, spec)[selection], target)
    rows = np.empty((len(selection), *spec.inner), spec.stored_dtype) if out is None else out[: len(selection)]
    if arrays.holds(name) or shard.whole_arrays:
        return _copied(arrays.whole(name, spec)[selection], rows)
    # Rows whose gap is less than a chunk are read by one call: the chunk between them is read anyway.
    gaps = np.flatnonzero(np.diff(selection) > spec.chunk_rows) + 1
    for group in np.split(np.arange(len(selection)), gaps):
        if not group.size:
            continue
        low, high = int(selection[group[0]]), int(selection[group[-1]]) + 1
        target = rows[group[0] : group[-1] + 1]
        if high - low == len(group):
            shard.read(row, name, low, high - low, target)
        else:
            target[:] = shard.read(row, name, low, high - low)[selection[group] - low]
    return rows


def _copied(rows: NDArray[Any], target: NDArray[Any] | None) -> NDArray[Any]:
    """Return rows, [n, *inner], in the memory of `target`, or in memory of their own that holds no others."""
    if target is None:
        return rows.copy()
    target[:] = rows
    return target
