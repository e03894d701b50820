"""What benchmarks need beside `draftcache.tools.result_rows`: means of runs that differ in their seed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from draftcache.tools.students_t import half_width


def paired_means(
    name: str, values: Sequence[float], reference: Sequence[float] | None, suffix: str = ""
) -> dict[str, float]:
    """Return the mean of runs that differ in their seed, the half width of its 95 % interval, and the same of the
    paired differences to `reference`, the runs of another case with the same seeds, where it is given.

    The metrics are `name`, half_width, difference and difference_half_width, each with `suffix`.
    """
    found = {name: statistics.fmean(values), "half_width": half_width(values)}
    if reference is not None:
        changes = [mine - theirs for mine, theirs in zip(values, reference, strict=True)]
        found |= {"difference": statistics.fmean(changes), "difference_half_width": half_width(changes)}
    return {f"{metric}{suffix}": value for metric, value in found.items()}
