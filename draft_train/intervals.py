"""Confidence intervals of ratios over conversations, by the bootstrap.

Verify steps of one conversation resemble each other, so conversations are what is drawn again, never verify steps: of C
conversations, C are drawn with replacement, their counts are summed, and the ratio is made of the sums. 2,000 draws
give the 95 % interval between the draws' 2.5th and 97.5th percentiles. All columns of counts are summed over the same
draws, so that the difference between two drafts on the same conversations is a paired one.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2_000
FEWEST = 5
"""Conversations below which there is no interval: draws of so few say too little of how conversations differ."""
LEVEL = 0.95
"""Share of the draws that lie within an interval."""
_DRAWN = 1 << 22
"""Conversations that are drawn at once: 32 MB of numbers."""


def resampled_sums(counts: NDArray[Any], *, resamples: int = RESAMPLES, seed: int = 0) -> NDArray[np.float64]:
    """Return the sums [resamples, M] of the columns of `counts` [C, M] over conversations drawn with replacement.

    The cost is `resamples` x C draws, a second for 100,000 conversations, and one matrix product.
    """
    members = counts.shape[0]
    values = counts.astype(np.float64)
    sums = np.zeros((resamples, counts.shape[1]))
    rng = np.random.default_rng(seed)
    at_once = max(1, _DRAWN // max(1, members))
    for first in range(0, resamples if members else 0, at_once):
        size = min(at_once, resamples - first)
        drawn = rng.integers(members, size=(size, members))
        drawn += members * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * members).reshape(size, members)
        sums[first : first + size] = times @ values
    return sums


def interval(draws: NDArray[np.float64], conversations: int) -> list[float] | None:
    """Return the two ends of the interval of a figure whose draws are [resamples], where NaN is no value.

    It is None where fewer than FEWEST conversations are behind the figure.
    """
    if conversations < FEWEST:
        return None
    ends = (100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all draws NaN
        low, high = np.nanpercentile(draws, ends)
    return None if np.isnan(low) or np.isnan(high) else [float(low), float(high)]


def ratio(upper: NDArray[np.float64], lower: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return upper / lower, element by element; NaN where lower is 0."""
    quotient = np.full(np.broadcast(upper, lower).shape, np.nan)
    np.divide(upper, lower, out=quotient, where=lower != 0)
    return quotient
