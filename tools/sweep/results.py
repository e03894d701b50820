"""What a sweep has found: a row per trial, and for each combination of its other axes the mean over seeds."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draftcache.draft_train.run_log import read_records
from draftcache.store.common.files import atomic_path, read_json, write_json
from draftcache.tools.students_t import half_width
from draftcache.tools.sweep.plan import SEED, Sweep, Trial
from draftcache.tools.sweep.rungs import Rungs
from draftcache.tools.sweep.worker import FAILED, is_finished

_LAST = 0.1
"""Share of a run's steps, its last ones, over which its training loss is averaged."""


def collect(sweep: Sweep, output: Path) -> dict[str, Any]:
    """Return the results of a sweep in its present state, as JSON values: `trials` and `means`."""
    ended = Rungs(output, sweep.asha).ended() if sweep.asha is not None else {}
    rows = [_row(trial, ended) for trial in sweep.trials]
    return {"axes": sweep.axes, "trials": rows, "means": _means(sweep, rows)}


def _row(trial: Trial, ended: dict[str, int]) -> dict[str, Any]:
    run = trial.config.output
    records, _ = read_records(run)
    measured = [record for record in records if "eval_acceptance_length" in record]
    state = "waiting" if not records else "running"
    if is_finished(trial):
        state = "finished"
    elif trial.name in ended:
        state = "ended early"
    elif (run / FAILED).is_file():
        state = "failed: " + str(read_json(run / FAILED)["error"])
    last = records[-max(1, round(_LAST * len(records))) :]
    return {
        "trial": trial.name,
        **trial.axes,
        "state": state,
        "steps": records[-1]["step"] if records else 0,
        "acceptance_length": measured[-1]["eval_acceptance_length"] if measured else None,
        "best_acceptance_length": max((row["eval_acceptance_length"] for row in measured), default=None),
        "training_loss": statistics.fmean(record["loss"] for record in last) if last else None,
        "tail_mass": last[-1]["tail_mass"] if last else None,
        "tokens_per_second": statistics.median(row["tokens_per_second"] for row in records) if records else None,
    }


def _means(sweep: Sweep, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each combination of axes other than the seed, the mean of its finished trials, the best first."""
    others = [name for name in sweep.axes if name != SEED]
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["state"] == "finished" and row["acceptance_length"] is not None:
            found.setdefault(json.dumps([row[name] for name in others]), []).append(row)
    means = []
    for group in found.values():
        lengths = [row["acceptance_length"] for row in group]
        means.append(
            {name: group[0][name] for name in others}
            | {
                "trials": len(group),
                "acceptance_length": statistics.fmean(lengths),
                "half_width": None if len(lengths) < 2 else half_width(lengths),
                "training_loss": statistics.fmean(row["training_loss"] for row in group),
            }
        )
    return sorted(means, key=lambda row: -row["acceptance_length"])


def write_results(results: dict[str, Any], output: Path) -> None:
    """Write results.json and results.csv into the sweep's directory."""
    write_json(output / "results.json", results)
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(results["trials"][0]))
    writer.writeheader()
    writer.writerows(results["trials"])
    with atomic_path(output / "results.csv") as partial:
        partial.write_text(text.getvalue(), encoding="utf-8")


def format_results(results: dict[str, Any]) -> str:
    """Return a table: the means over seeds with 95 % intervals, the best first, then trials that are not finished."""
    others = [name for name in results["axes"] if name != SEED]
    header = [*others, "trials", "acceptance", "interval", "loss"]
    table = [header]
    for row in results["means"]:
        width = "" if row["half_width"] is None else f"+- {row['half_width']:.3f}"
        figures = [str(row["trials"]), f"{row['acceptance_length']:.3f}", width, f"{row['training_loss']:.3f}"]
        table.append([*(str(row[name]) for name in others), *figures])
    widths = [max(len(line[column]) for line in table) for column in range(len(header))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
    for row in results["trials"]:
        if row["state"] != "finished":
            measured = row["acceptance_length"]
            shown = "" if measured is None else f", acceptance {measured:.3f}"
            axes = ", ".join(f"{name} {row[name]}" for name in results["axes"])
            lines.append(f"{row['trial']} ({axes}): {row['state']} after {row['steps']} steps{shown}")
    return "\n".join(lines)
