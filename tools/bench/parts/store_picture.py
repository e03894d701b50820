"""The store benchmark's table and picture, made from its result rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draftcache.tools.reports.accounting import text_table

_COLUMNS = (
    ("bytes_per_token", "bytes/token", ",.0f"),
    ("write_cpu_s_per_gb", "write CPU-s/GB", ".2f"),
    ("read_cpu_s_per_gb", "read CPU-s/GB", ".2f"),
    ("decoded_cpu_s_per_gb", "+ decode on CPU", ".2f"),
    ("read_gb_s", "read GB/s", ".2f"),
    ("window_gb_s", "4k windows GB/s", ".2f"),
    ("open_30k_ms", "open 30k, ms", ",.1f"),
)
_PANELS = (
    ("bytes_per_token", "bytes per token", ",.0f"),
    ("write_cpu_s_per_gb", "write, CPU-s per GB", ".2g"),
    ("read_cpu_s_per_gb", "read, CPU-s per GB", ".2g"),
)
_OURS, _OTHERS = "#1f6f8b", "#b9b4a7"

Rows = Sequence[dict[str, Any]]


def table(rows: Rows) -> str:
    """Return a Markdown table with a line per case, without columns that no case was measured for."""
    values = _values(rows)
    columns = [column for column in _COLUMNS if any(column[0] in of_case for of_case in values.values())]
    lines = [
        [case, *(format(of_case[metric], form) if metric in of_case else "-" for metric, _, form in columns)]
        for case, of_case in values.items()
    ]
    return text_table(["Format", *(title for _, title, _ in columns)], lines)


def draw(rows: Rows, path: Path) -> None:
    """Write a PNG with bars of size and CPU time per case, ours in another colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    values = _values(rows)
    panels = [panel for panel in _PANELS if any(panel[0] in of_case for of_case in values.values())]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.6 * len(panels), 3.4), squeeze=False)
    for axis, (metric, title, form) in zip(axes[0], panels, strict=True):
        cases = [case for case in values if metric in values[case]][::-1]
        sizes = [values[case][metric] for case in cases]
        bars = axis.barh(cases, sizes, color=[_OURS if case.startswith("ours") else _OTHERS for case in cases])
        axis.bar_label(bars, labels=[format(size, form) for size in sizes], padding=2, fontsize=7)
        axis.set_title(title, fontsize=9)
        axis.tick_params(axis="y", labelsize=8, length=0)
        axis.set_xticks([])
        axis.margins(x=0.18)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _values(rows: Rows) -> dict[str, dict[str, float]]:
    """Return {case: {metric: value}} of the cases that have a size, in the order of the rows."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        found.setdefault(row["case"], {})[row["metric"]] = row["value"]
    return {case: of_case for case, of_case in found.items() if "bytes_per_token" in of_case}
