"""How many sequences have which length: exact figures of any number of them, in memory for the distinct lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import numpy as np


class LengthCounts:
    """Counts lengths in tokens as they come; `as_json()` are their quantiles and a histogram."""

    def __init__(self, lengths: Iterable[int] | np.ndarray = ()) -> None:
        self._counts: Counter[int] = Counter()
        self.add(lengths)

    def add(self, lengths: Iterable[int] | np.ndarray) -> None:
        """Count further lengths, integers [n] of at least 0."""
        array = lengths if isinstance(lengths, np.ndarray) else np.array(list(lengths), np.int64)
        values, counts = np.unique(array, return_counts=True)
        self._counts.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))

    def as_json(self) -> dict[str, Any]:
        """Return `count`, `min`, `mean`, `p50`, `p90`, `max`, and `bins` of lengths in [2^n, 2^(n+1)); 0 counts with 1.

        Quantiles are interpolated linearly. Where nothing was counted, there are `count` 0 and no bins alone. Bins are
        without gaps, from that of the shortest to that of the longest.
        """
        count = self._counts.total()
        if not count:
            return {"count": 0, "bins": []}
        lengths = sorted(self._counts)
        powers: Counter[int] = Counter()
        for length in lengths:
            powers[max(length, 1).bit_length() - 1] += self._counts[length]
        ends = list(accumulate(self._counts[length] for length in lengths))
        return {
            "count": count,
            "min": lengths[0],
            "mean": sum(length * self._counts[length] for length in lengths) / count,
            "p50": _quantile(lengths, ends, 0.5),
            "p90": _quantile(lengths, ends, 0.9),
            "max": lengths[-1],
            "bins": [
                {"from": 1 << power, "to": 2 << power, "count": powers[power]}
                for power in range(min(powers), max(powers) + 1)
            ],
        }


def _quantile(lengths: list[int], ends: list[int], share: float) -> float:
    """Return a quantile of the values of which `ends[i]` are at most `lengths[i]`, as numpy's `quantile` does."""
    at = (ends[-1] - 1) * share
    below, above = (
        lengths[int(np.searchsorted(ends, place, side="right"))] for place in (int(at), min(int(at) + 1, ends[-1] - 1))
    )
    return below + (above - below) * (at - int(at))
