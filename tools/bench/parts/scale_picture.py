"""The picture of `draftcache.tools.bench.scale`, made from its result rows alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_CAPTURE, _TRAIN, _OTHER = "#1f6f8b", "#c8553d", "#b9b4a7"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a PNG: efficiency by number of GPUs, beside the share of time that ranks wait, by order."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(8.4, 3.2))
    lines = (("capture", "capture", _CAPTURE), ("train", "training, bucketed", _TRAIN))
    lowest = 0.55
    for case, label, colour in lines:
        points = by_count(rows, rf"{case}-(\d+)", "efficiency")
        if not points:
            continue
        lowest = min(lowest, *points.values())
        left.plot(points.keys(), points.values(), "o-", color=colour, label=label)
    left.axhline(1.0, color=_OTHER, linestyle="--", label="ideal")
    left.set_ylim(lowest - 0.05, 1.05)
    left.set_title("tokens/s per GPU, as a share of one GPU's", fontsize=9)
    orders = (("bucketed", r"train-(\d+)", _TRAIN), ("shuffled", r"train-(\d+)-shuffled", _OTHER))
    for number, (label, pattern, colour) in enumerate(orders):
        points = {count: share for count, share in by_count(rows, pattern, "waiting_share").items() if count > 1}
        places = [index + 0.38 * (number - 0.5) for index in range(len(points))]
        bars = right.bar(places, points.values(), 0.36, color=colour, label=label)
        right.bar_label(bars, labels=[f"{100 * share:.1f} %" for share in points.values()], fontsize=7)
        right.set_xticks(range(len(points)), [str(count) for count in points])
    right.set_title("share of time that ranks wait for the slowest", fontsize=9)
    counts = sorted({*by_count(rows, r"capture-(\d+)", "tok_s"), *by_count(rows, r"train-(\d+)", "tok_s")})
    left.set_xticks(counts, [str(count) for count in counts])
    for axis in (left, right):
        axis.set_xlabel("GPUs", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.legend(fontsize=7, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def by_count(rows: Sequence[dict[str, Any]], pattern: str, metric: str) -> dict[int, float]:
    """Return a metric by the number in the names of cases that match `pattern`, ascending."""
    found = {
        int(match[1]): float(row["value"])
        for row in rows
        if row["metric"] == metric and (match := re.fullmatch(pattern, row["case"]))
    }
    return dict(sorted(found.items()))
