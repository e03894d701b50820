"""The demo's picture: loss and acceptance while training, and acceptance per split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from draftcache.store.common.files import atomic_path


def draw_curves(metrics: dict[str, Path], summary: dict[str, Any], output: Path) -> None:
    """Write a PNG of three panels. `metrics` holds the path of metrics.jsonl by stage, in the order of training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (loss_axis, acceptance_axis, split_axis) = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    offset = 0
    for stage, path in metrics.items():
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        loss_axis.plot([offset + row["step"] for row in rows], [row["loss"] for row in rows], label=stage, linewidth=1)
        measured = [row for row in rows if "eval_acceptance_length" in row]
        acceptance_axis.plot(
            [offset + row["step"] for row in measured],
            [row["eval_acceptance_length"] for row in measured],
            marker="o",
            label=stage,
        )
        offset += len(rows)
    loss_axis.set(title="training loss (weighted sum over unroll steps)", xlabel="optimizer step")
    acceptance_axis.set(title="held-out acceptance length while training", xlabel="optimizer step")
    bars = {
        "untrained": summary["baseline_untrained"],
        "bigram": summary["baseline_bigram"],
        **summary["acceptance_length"],
    }
    splits = list(summary["kind"])
    for number, (name, values) in enumerate(bars.items()):
        centers = [index + 0.2 * number for index in range(len(splits))]
        split_axis.bar(centers, [values[split] for split in splits], width=0.18, label=name)
    split_axis.set_xticks([index + 0.3 for index in range(len(splits))], splits)
    split_axis.set(title="acceptance length by split (1 = no gain)")
    split_axis.set_ylim(bottom=0.9)
    for axis in (loss_axis, acceptance_axis, split_axis):
        axis.legend()
        axis.grid(alpha=0.3)
    with atomic_path(output) as partial:
        figure.savefig(partial, dpi=110, format="png")
    pyplot.close(figure)
