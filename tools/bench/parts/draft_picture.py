"""The table and picture of `draftcache.tools.bench.drafts`, made from its result rows alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from draftcache.tools.bench.parts.draft_cases import CASES, LAYERS, REFERENCE
from draftcache.tools.reports.accounting import text_table

COLORS = {"eagle3": "#b9b4a7", "dflash": "#c97b2d", "dspark": "#1f6f8b"}
_APART = 0.08
_SHOWN = 5
"""Draft tokens of the differences in the table."""

Rows = Sequence[dict[str, Any]]
Values = Mapping[str, Mapping[str, float]]


def table(rows: Rows, tokens: Sequence[int]) -> str:
    """Return a Markdown table with a line per case; bold differences are outside their 95 % interval."""
    values = values_of(rows)
    titles = ["draft", "parameters", *(f"{count} tokens" for count in tokens), f"against {REFERENCE}, {_SHOWN} tokens"]
    titles += [f"draft, ms, {count}" for count in tokens] + [f"speed-up, {count}" for count in tokens]
    lines = []
    for case, found in values.items():
        line = [case, f"{found['draft_parameters'] / 1e6:,.1f} M" if "draft_parameters" in found else "-"]
        line += [_with_interval(found, "acceptance_length", "half_width", count) for count in tokens]
        line.append(_with_interval(found, "difference", "difference_half_width", _SHOWN))
        for metric, form in (("draft_ms", ".3f"), ("speedup", ".2f")):
            line += [
                format(found[f"{metric}@{count}"], form) if f"{metric}@{count}" in found else "-" for count in tokens
            ]
        lines.append(line)
    return text_table(titles, lines)


def _with_interval(found: Mapping[str, float], metric: str, width: str, count: int) -> str:
    if f"{metric}@{count}" not in found:
        return "-"
    value, half = found[f"{metric}@{count}"], found[f"{width}@{count}"]
    if metric != "difference":
        return f"{value:.3f} ± {half:.3f}"
    text = f"{value:+.3f} ± {half:.3f}"
    return f"**{text}**" if abs(value) > half else text


def draw(rows: Rows, path: Path, tokens: Sequence[int]) -> None:
    """Write a PNG: for each number of draft tokens, acceptance and predicted speed-up against the draft's layers.

    Error bars are 95 % intervals over seeds.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    values = values_of(rows)
    figure, axes = pyplot.subplots(2, len(tokens), figsize=(3.2 * len(tokens), 5.2), squeeze=False, sharex=True)
    for column, count in enumerate(tokens):
        for axis, metric in zip(axes[:, column], ("acceptance_length", "speedup"), strict=True):
            for number, (draft, color) in enumerate(COLORS.items()):
                cases = [
                    case for case in CASES.values()
                    if case.draft == draft and f"{metric}@{count}" in values.get(case.name, {})
                ]  # fmt: skip
                if not cases:
                    continue
                found = [values[case.name] for case in cases]
                lengths = [of_case[f"{metric}@{count}"] for of_case in found]
                shares = [of_case[f"half_width@{count}"] / of_case[f"acceptance_length@{count}"] for of_case in found]
                bars = [length * share for length, share in zip(lengths, shares, strict=True)]
                places = [case.layers + _APART * (number - 1) for case in cases]  # so that no point hides another
                axis.errorbar(places, lengths, bars, color=color, marker="o", markersize=4, capsize=3, label=draft)
            axis.set_xticks(LAYERS)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=8)
        axes[0, column].set_title(f"{count} draft tokens", fontsize=9)
        axes[1, column].set_xlabel("layers of the draft", fontsize=8)
    axes[0, 0].set_ylabel("tokens per verify step", fontsize=8)
    axes[1, 0].set_ylabel("predicted speed-up", fontsize=8)
    axes[0, 0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def values_of(rows: Rows) -> dict[str, dict[str, float]]:
    """Return {case: {metric: value}} of the drafts, in the order of the rows."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["case"] in CASES:
            found.setdefault(row["case"], {})[row["metric"]] = row["value"]
    return found
