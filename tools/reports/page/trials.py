"""The trials of a sweep, grouped by their axes, with intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from draftcache.tools.reports.page.evaluations import SplitFigures
from draftcache.tools.reports.page.runs import Run
from draftcache.tools.students_t import half_width


@dataclass(frozen=True)
class TrialGroup:
    """Trials that differ in their seed only."""

    axes: dict[str, Any]
    runs: list[Run]
    values: list[float]
    """The figure of each trial that has one."""

    @property
    def name(self) -> str:
        """Its axes as text."""
        return ", ".join(f"{name} {value}" for name, value in self.axes.items()) or "all trials"

    @property
    def mean(self) -> float | None:
        """Mean over the seeds; None where no trial has a figure yet."""
        return sum(self.values) / len(self.values) if self.values else None

    @property
    def interval(self) -> list[float] | None:
        """95 % interval of the mean over seeds, by Student's t; None for fewer than two seeds."""
        if self.mean is None or len(self.values) < 2:
            return None
        half = half_width(self.values)
        return [self.mean - half, self.mean + half]


LOSS = "loss of the last 50 steps"


def trial_figure(runs: Sequence[Run], items: Sequence[SplitFigures]) -> tuple[str, dict[str, float]]:
    """Return which figure stands for a trial, and its value by the run's name.

    It is the acceptance length of `draftcache eval` on the first split that was evaluated; without such files the last
    one that was measured while training; and without those the loss of the last 50 steps.
    """
    if items:
        split = items[0].split
        chosen = {item.name: float(item.row["draft"]["acceptance_length"]) for item in items if item.split == split}
        return f"acceptance length on {split}", chosen
    logged = {run.name: run.column("eval_acceptance_length")[1] for run in runs}
    if any(logged.values()):
        return "acceptance length at the last evaluation", {name: rows[-1] for name, rows in logged.items() if rows}
    losses = {run.name: run.column("loss")[1][-50:] for run in runs}
    return LOSS, {name: sum(rows) / len(rows) for name, rows in losses.items() if rows}


def group_trials(runs: Sequence[Run], values: dict[str, float], *, least_first: bool = False) -> list[TrialGroup]:
    """Return the groups of trials that share all axes but `seed`, the best mean first; groups without one last."""
    groups: dict[str, tuple[dict[str, Any], list[Run]]] = {}
    for run in runs:
        axes = {name: value for name, value in run.axes.items() if name != "seed"}
        groups.setdefault(repr(axes), (axes, []))[1].append(run)
    made = [
        TrialGroup(axes, members, [values[run.name] for run in members if run.name in values])
        for axes, members in groups.values()
    ]
    sign = 1.0 if least_first else -1.0
    return sorted(made, key=lambda group: math.inf if group.mean is None else sign * group.mean)
