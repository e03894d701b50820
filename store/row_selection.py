"""The reader's choice of rows: which rows of a conversation's slices a read needs, and how it fetches them."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from draftcache.store.common.errors import InputError
from draftcache.store.format.array_spec import COUNT_FIELD, ROWS_AXIS, TEACHER_AXIS, TOKENS_AXIS, ArraySpec
from draftcache.store.format.rows import rows_in_reach
from draftcache.store.layouts.registry import ShardReader

Selection: TypeAlias = NDArray[np.int64] | slice
"""Offsets of rows within a conversation's slice: [n] int64 ascending, or a slice without gaps."""


def select_rows(
    shard: ShardReader,
    row: np.void,
    axes: set[str],
    *,
    tokens: tuple[int, int] | None,
    window: int | None,
    stored_window: int | None,
    where: str,
) -> dict[str, Selection]:
    """Return which rows to read of one conversation's slices, by axis. See `StoreReader.read`.

    `row` is the conversation's index row. Only for `axes` are positions read from the shard to find the rows.
    `stored_window` is the store's window, which `window` must not exceed. Raises InputError, which names `where`, for a
    token range or a window that the store does not hold.
    """
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
        positions = shard.read(row, "teacher_positions", 0, int(row["teacher_rows"]))
        selected[TEACHER_AXIS] = _between(positions, first, last)
    if ROWS_AXIS in axes:
        positions = shard.read(row, "positions", 0, int(row["rows"]))
        if window is None:
            selected[ROWS_AXIS] = _between(positions, first, last)
        else:
            if stored_window is not None and window > stored_window:
                raise InputError(
                    f"{where}: expected a window of at most {stored_window}, found {window}; rows beyond it were not "
                    "stored"
                )
            loss_mask = shard.read(row, "loss_mask", 0, length).astype(np.bool_)
            selected[ROWS_AXIS] = np.searchsorted(positions, rows_in_reach(loss_mask, window, (first, last)))
    return selected


def _between(positions: NDArray[Any], first: int, last: int) -> slice:
    """Return the slice of ascending positions that are at least `first` and below `last`."""
    return slice(*(int(edge) for edge in np.searchsorted(positions, (first, last))))


def read_rows(
    shard: ShardReader, row: np.void, name: str, spec: ArraySpec, selection: Selection, out: NDArray[Any] | None
) -> NDArray[Any]:
    """Return the selected rows of one conversation's slice of the array `name`.

    The result [n, *inner] has the stored dtype, and is a view of `out` where that is given. Raises ShardDamagedError.
    """
    if isinstance(selection, slice):
        count = selection.stop - selection.start
        return shard.read(row, name, selection.start, count, None if out is None else out[:count])
    rows = np.empty((len(selection), *spec.inner), spec.stored_dtype) if out is None else out[: len(selection)]
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
