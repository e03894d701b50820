"""Which rows exist: start rows, their loss steps, the rows in their reach, and teacher positions.

Notation, shared by capture, training and evaluation: the tokens are `x_0 .. x_{L-1}`, and `mask[j]` is True where the
assistant wrote `x_j`. Row `t` at step `k` consumes `x_{t+1+k}` and predicts `x_{t+2+k}`. Its teacher is the verifier's
distribution at position `t+1+k`.

A draft starts where the verifier has just produced a token, so row `t` is a start row iff `mask[t+1]`. Its step
`k` carries loss iff `mask[t+2], ..., mask[t+2+k]` are all True too, which means that the same turn goes on. A start row
without any loss step (its `x_{t+1}` closes the turn) is not computed, so the functions below leave it out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]


def run_lengths(loss_mask: BoolArray) -> IntArray:
    """Return, for each j in [0, L], how many of `mask[j], mask[j+1], ...` are True before the first False.

    `loss_mask` is [L] bool, the result [L+1] int64.
    """
    length = loss_mask.shape[0]
    stops = np.flatnonzero(~np.append(loss_mask, False))
    return stops[np.searchsorted(stops, np.arange(length + 1))] - np.arange(length + 1)


def start_rows(loss_mask: BoolArray) -> IntArray:
    """Return the rows t, [S] int64 ascending, at which a draft starts and has at least one loss step.

    These are the rows with `mask[t+1]` and `mask[t+2]`, for a mask [L].
    """
    mask = np.asarray(loss_mask, dtype=np.bool_)
    return np.flatnonzero(mask[1:-1] & mask[2:])


def tokens_left(loss_mask: BoolArray, rows: NDArray[Any]) -> IntArray:
    """Return how many tokens of the turn are still to be written when a draft starts at each of `rows` [S].

    This is the run of True from t+2 on, [S] int64. Step k of row t carries loss iff `k < tokens_left[t]`.
    """
    left: IntArray = run_lengths(np.asarray(loss_mask, dtype=np.bool_))[np.asarray(rows) + 2]
    return left


def rows_in_reach(loss_mask: BoolArray, window: int | None, tokens: tuple[int, int] | None = None) -> IntArray:
    """Return the rows t, [R] int64 ascending, whose verifier state some start row s reads: `t <= s < t + window`.

    Where `window` is None, any start row s >= t counts. `tokens` (a, b) counts only start rows `a <= s < b`. Step k > 0
    sees less than step 0 (`t + k - j < window`), so step 0 decides.
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
    """Return the positions p = t+1+k, [P] int64 ascending, of all loss-carrying pairs of a row and a step.

    These are the positions p >= 1 with `mask[p]` and `mask[p+1]`.
    """
    return start_rows(loss_mask) + 1
