"""The picture of a sweep: acceptance while training, and acceptance along each axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from draftcache.draft_train.run_log import read_records
from draftcache.store.common.files import atomic_path
from draftcache.tools.sweep.plan import SEED, Sweep


def draw_sweep(sweep: Sweep, results: dict[str, Any], output: Path) -> None:
    """Write a PNG with one panel over steps and one per axis but the seed. Raises ImportError without matplotlib.

    Points of an axis are combinations of the other axes, each the mean over its seeds with its 95 % interval.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = [name for name in sweep.axes if name != SEED and len(sweep.axes[name]) > 1]
    figure, panels = pyplot.subplots(
        1, 1 + len(axes), figsize=(5 * (1 + len(axes)), 4), layout="constrained", squeeze=False
    )
    curves, *by_axis = panels[0]
    for trial in sweep.trials:
        rows = [row for row in read_records(trial.config.output)[0] if "eval_acceptance_length" in row]
        curves.plot(
            [row["step"] for row in rows], [row["eval_acceptance_length"] for row in rows], linewidth=1, marker=".",
            alpha=0.7,
        )  # fmt: skip
    curves.set(title="acceptance length while training", xlabel="optimizer step")
    for name, panel in zip(axes, by_axis, strict=True):
        values = sweep.axes[name]
        for row in results["means"]:
            panel.errorbar(
                values.index(row[name]), row["acceptance_length"], row["half_width"] or 0, marker="o", capsize=3,
                color="tab:blue", alpha=0.6,
            )  # fmt: skip
        panel.set_xticks(range(len(values)), [str(value) for value in values])
        panel.set(title=f"acceptance length by {name}", xlabel=name)
    for panel in panels[0]:
        panel.grid(alpha=0.3)
    with atomic_path(output) as partial:
        figure.savefig(partial, dpi=110, format="png")
    pyplot.close(figure)
