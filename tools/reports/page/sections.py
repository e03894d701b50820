"""What each part of the page shows, as values for the templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from draftcache.tools.reports.acceptance_text import bucket_name
from draftcache.tools.reports.page.charts import Estimate, Series, interval_chart, line_chart
from draftcache.tools.reports.page.evaluations import SplitFigures
from draftcache.tools.reports.page.runs import Run
from draftcache.tools.reports.page.trials import LOSS, group_trials, trial_figure

_MOST_LINES = 8
"""Runs whose logs are drawn."""
_MOST_OF_EACH = 4
"""Runs with charts of their own."""
_BASELINES = (("untrained", "untrained draft"), ("bigram", "bigram table"))


def drawn_runs(runs: Sequence[Run], items: Sequence[SplitFigures]) -> list[tuple[int, Run]]:
    """Return the runs whose logs are drawn, with their colours: all, or the 8 with the best figures."""
    numbered = [(number, run) for number, run in enumerate(runs) if run.metrics]
    if len(numbered) <= _MOST_LINES:
        return numbered
    figure, values = trial_figure(runs, items)
    sign = 1.0 if figure == LOSS else -1.0
    best = sorted(numbered, key=lambda pair: sign * values.get(pair[1].name, sign * float("inf")))
    return sorted(best[:_MOST_LINES], key=lambda pair: pair[0])


def training_charts(numbered: Sequence[tuple[int, Run]]) -> list[Markup]:
    """Return the charts of the logs of runs: loss, acceptance, steps of the unroll, and how the training went."""

    def chart(title: str, key: str, label: str, **more: Any) -> Markup | None:
        series = [Series(run.name, number, *run.column(key), **more) for number, run in numbered if run.column(key)[0]]
        if not series:
            return None
        band = key == "loss" and len(series) <= _MOST_OF_EACH
        return line_chart(title, series, x_label="step", y_label=label, band=band, from_zero=key in _FROM_ZERO)

    charts = [
        chart("Loss", "loss", "loss"),
        chart(
            "Acceptance length on the held-out split", "eval_acceptance_length", "tokens per verify step", marks=True
        ),
    ]
    for _, run in numbered[:_MOST_OF_EACH]:
        series = [Series(str(k + 1), k, *column) for k, column in enumerate(run.columns("step_accuracy"))]
        title = f"Accuracy by draft token in training: {run.name}"
        charts.append(
            line_chart(title, series, x_label="step", y_label="teacher-forced", from_zero=True, key=True, points=40)
        )
    charts += [
        chart("Gradient norm", "grad_norm", "before clipping"),
        chart("Learning rate", "learning_rate", "AdamW"),
        chart("Throughput", "tokens_per_second", "tokens per second"),
        chart("Waiting for data", "data_wait_share", "share of the step"),
        chart("Tail mass of the teacher", "tail_mass", "probability beyond the top-k"),
    ]
    return [item for item in charts if item is not None]


_FROM_ZERO = ("tokens_per_second", "data_wait_share", "tail_mass", "learning_rate")


def acceptance_charts(items: Sequence[SplitFigures]) -> list[Markup]:
    """Return one chart per split: each draft with its interval beside the baselines, on one scale for all splits."""
    highest = max(
        (end for item in items for end in (item.row["draft"]["interval"] or [item.row["draft"]["acceptance_length"]])),
        default=2.0,
    )
    charts = []
    for split, some in _by_split(items):
        rows = _baselines(some)
        rows += [
            Estimate(item.name, item.colour, item.row["draft"]["acceptance_length"], item.row["draft"]["interval"])
            for item in some
        ]
        charts.append(interval_chart(split, rows, low=1.0, high=max(1.5, highest), reference=1.0))
    return charts


def _baselines(items: Sequence[SplitFigures]) -> list[Estimate]:
    rows = []
    for key, name in _BASELINES:
        figures = next((item.row[key] for item in items if key in item.row), None)
        if figures is not None:
            rows.append(Estimate(name, None, figures["acceptance_length"], figures["interval"]))
    return rows


def acceptance_rows(items: Sequence[SplitFigures]) -> list[dict[str, Any]]:
    """Return the rows of the table under these charts."""
    rows = []
    for _, some in _by_split(items):
        for item in some:
            figures = item.row["draft"]
            rows.append(
                {
                    "split": item.split,
                    "name": item.name,
                    "colour": item.colour,
                    "step": item.body["step"],
                    "value": figures["acceptance_length"],
                    "interval": figures["interval"],
                    "bigram": item.row.get("bigram", {}).get("acceptance_length"),
                    "untrained": item.row["untrained"]["acceptance_length"],
                    "most": item.body["draft_tokens"] + 1,
                    "verify_steps": figures["verify_steps"],
                    "conversations": figures["conversations"],
                    "kind": figures["kind"],
                    "sampled": figures.get("sampled"),
                }
            )
    return rows


def token_charts(items: Sequence[SplitFigures]) -> list[Markup]:
    """Return one chart per split: the acceptance of each draft token, given that those before it were accepted."""
    charts = []
    for split, some in _by_split(items):
        series = []
        for key, name in _BASELINES[1:]:
            figures = next((item.row[key] for item in some if key in item.row), None)
            series += [] if figures is None else [_by_token(name, None, figures)]
        series += [_by_token(item.name, item.colour, item.row["draft"]) for item in some]
        charts.append(line_chart(split, series, x_label="draft token", y_label="accepted", from_zero=True))
    return charts


def _by_token(name: str, colour: int | None, figures: dict[str, Any]) -> Series:
    tried = [number for number, count in enumerate(figures["proposals"]) if count]
    values = figures["conditional_acceptance"]
    return Series(name, colour, [number + 1.0 for number in tried], [values[number] for number in tried], marks=True)


def length_tables(items: Sequence[SplitFigures]) -> list[dict[str, Any]]:
    """Return a chart and rows for each split and axis that has more than one bucket."""
    result = []
    for split, some in _by_split(items):
        for axis, title in (("by_position", "by position"), ("by_length", "by length of the conversation")):
            rows = [(item, row) for item in some for row in item.row["draft"][axis]]
            rows.sort(key=lambda pair: pair[1]["from"])  # the drafts of a bucket stand side by side
            if all(len(item.row["draft"][axis]) < 2 for item in some):
                continue
            estimates = [
                Estimate(_bucket(item, row, len(some)), item.colour, row["acceptance_length"], row["interval"])
                for item, row in rows
            ]
            ends = [end for estimate in estimates for end in (estimate.interval or [estimate.value])]
            chart = interval_chart(f"{split}, {title}", estimates, low=min(1.0, *ends), high=max(ends), reference=1.0)
            shown = [
                {"name": item.name, "colour": item.colour, "bucket": bucket_name(row), **row} for item, row in rows
            ]
            result.append({"split": split, "title": title, "chart": chart, "rows": shown})
    return result


def _bucket(item: SplitFigures, row: dict[str, Any], drafts: int) -> str:
    return bucket_name(row) if drafts == 1 else f"{bucket_name(row)} {item.name}"


def _by_split(items: Sequence[SplitFigures]) -> list[tuple[str, list[SplitFigures]]]:
    splits = dict.fromkeys(item.split for item in items)
    return [(split, [item for item in items if item.split == split]) for split in splits]


def trial_section(runs: Sequence[Run], items: Sequence[SplitFigures]) -> dict[str, Any]:
    """Return the table and chart of a sweep's trials, grouped by all axes but the seed."""
    figure, values = trial_figure(runs, items)
    groups = group_trials(runs, values, least_first=figure == LOSS)
    estimates = [Estimate(group.name, 0, group.mean, group.interval) for group in groups if group.mean is not None]
    ends = [end for item in estimates for end in (item.interval or [item.value])]
    chart = interval_chart(figure, estimates, low=min(ends), high=max(ends)) if ends else None
    axes = list(dict.fromkeys(name for group in groups for name in group.axes))
    return {"figure": figure, "groups": groups, "chart": chart, "axes": axes}
