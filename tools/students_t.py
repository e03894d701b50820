"""Confidence intervals of the mean of a few independent runs, such as those that differ in their seed alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""The 97.5 % quantile of Student's t distribution for 1, 2, ... 30 degrees of freedom; more count as 30."""


def half_width(values: Sequence[float]) -> float:
    """Return the half-width of the 95 % confidence interval of the mean of independent runs, NaN for a single one.

    It is Student's: the standard error times the 97.5 % quantile of t with n - 1 degrees of freedom.
    """
    if len(values) < 2:
        return math.nan
    quantile = _QUANTILES[min(len(values) - 1, len(_QUANTILES)) - 1]
    return quantile * statistics.stdev(values) / math.sqrt(len(values))
