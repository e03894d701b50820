"""Which rows exist: start rows, their loss steps, the rows in their reach, and teacher positions.

Notation, shared by capture, training and evaluation: tokens `x_0 .. x_{L-1}`; `mask[j]` is True when the
assistant wrote `x_j`. Row `t` at step `k` consumes `x_{t+1+k}`, predicts `x_{t+2+k}`, and its teacher is the
verifier's distribution at position `t+1+k`.

A draft starts where the verifier has just produced a token, so row `t` is a start row iff `mask[t+1]`. Its step
`k` carries loss iff `mask[t+2], ..., mask[t+2+k]` are all True too: the same turn goes on. A start row without
any loss step (its `x_{t+1}` closes the turn) is not computed, so it is left out here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]


def run_lengths(loss_mask: BoolArray) -> IntArray:
    """For each j in [0, L]: how many of `mask[j], mask[j+1], ...` are True before the first False. [L+1] int64."""
    length = loss_mask.shape[0]
    stops = np.flatnonzero(~np.append(loss_mask, False))
    return stops[np.searchsorted(stops, np.arange(length + 1))] - np.arange(length + 1)


def start_rows(loss_mask: BoolArray) -> IntArray:
    """Rows t with `mask[t+1]` and `mask[t+2]`: a draft starts there and has at least one loss step. [S] int64."""
    mask = np.asarray(loss_mask, dtype=np.bool_)
    return np.flatnonzero(mask[1:-1] & mask[2:])


def tokens_left(loss_mask: BoolArray, rows: NDArray[Any]) -> IntArray:
    """Tokens of the turn still to be written when a draft starts at each row: the run of True from t+2. [S] int64.

    Step k of row t carries loss iff `k < tokens_left[t]`.
    """
    left: IntArray = run_lengths(np.asarray(loss_mask, dtype=np.bool_))[np.asarray(rows) + 2]
    return left


def rows_in_reach(loss_mask: BoolArray, window: int | None, tokens: tuple[int, int] | None = None) -> IntArray:
    """Rows whose verifier state some start row s reads: `t <= s < t + window` (any s >= t if window is None).

    `tokens` (a, b) counts only start rows `a <= s < b`. Step k > 0 sees less than step 0 (`t + k - j < window`), so
    step 0 decides. [R] int64, ascending.
    """
    length = loss_mask.shape[0]
    first, end = tokens or (0, length)
    starts = start_rows(loss_mask)
    is_start = np.zeros(length, dtype=np.int64)
    is_start[starts[(starts >= first) & (starts < end)]] = 1
    starts_before = np.zeros(length + 1, dtype=np.int64)
    np.cumsum(is_start, out=starts_before[1:])
    rows = np.arange(length)
    last = np.full(length, length) if window is None else np.minimum(rows + window, length)
    return np.flatnonzero(starts_before[last] > starts_before[rows])


def teacher_positions(loss_mask: BoolArray) -> IntArray:
    """Positions p = t+1+k of loss-carrying (row, step) pairs: `mask[p]` and `mask[p+1]`, p >= 1. [P] int64."""
    return start_rows(loss_mask) + 1
