"""Training on N ranks in both orders: tokens per second, how long ranks wait for the slowest one, and equal losses."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np

from draftcache.store.common.errors import WorkerError
from draftcache.tools.bench.parts.scale_shapes import SHAPES
from draftcache.tools.bench.parts.scale_store import CHECK_SPLIT, part_splits
from draftcache.tools.bench.parts.scale_training import Run, TrainingJob

ORDERS = ("bucketed", "shuffle")
LOSS = "loss"
"""The name of the run whose losses are compared between world sizes."""
LOSS_LIMIT = 1e-3
"""Bound of `loss_difference`: sums over ranks are rounded in another order, and the optimizer carries that on."""
_EPOCHS, _CHECK_EPOCHS = 3, 4


@dataclass(frozen=True)
class Outcome:
    """What the ranks of one world size reported."""

    metrics: dict[str, dict[str, float]]
    """Metrics by order."""
    waits: dict[str, float]
    """Seconds that all ranks together waited for the slowest one, by order."""
    losses: list[float]
    """Of every step on `CHECK_SPLIT`."""


class Trainings:
    """Trains a draft of a shape, from a store of random states that is written once, on any number of ranks."""

    def __init__(self, root: Path, shape: str, device: str, most_ranks: int) -> None:
        """Write the store with `most_ranks` ranks. A step of the compared losses has as many conversations."""
        self._root, self._shape, self._device, self._batch = root, shape, device, most_ranks
        self._launch([], most_ranks, write=True)

    def run(self, ranks: int) -> Outcome:
        """Train on a part of the store per rank, with a conversation per rank and step, in both orders.

        So runs of all world sizes have as many steps. The first epoch of each warms up and does not count.
        """
        splits = list(part_splits(ranks))
        runs = [Run(name=order, splits=splits, order=order, epochs=_EPOCHS, batch=ranks) for order in ORDERS]
        runs.append(Run(name=LOSS, splits=[CHECK_SPLIT], order="shuffle", epochs=_CHECK_EPOCHS, batch=self._batch))
        reports = self._launch(runs, ranks)
        steps = SHAPES[self._shape].steps
        timings = {order: step_figures([report[order] for report in reports], steps) for order in ORDERS}
        return Outcome(
            metrics={order: timing[0] for order, timing in timings.items()},
            waits={order: timing[1] for order, timing in timings.items()},
            losses=[step["loss"] for step in reports[0][LOSS]["steps"]],
        )

    def _launch(self, runs: list[Run], ranks: int, *, write: bool = False) -> list[dict[str, Any]]:
        """Run a job by torchrun and return the ranks' reports."""
        asked, answer, output = (self._root / name for name in ("training.json", "ranks.json", "runs"))
        job = TrainingJob(
            shape=self._shape, device=self._device, store=str(self._root / "training-store"), output=str(output),
            write=write, runs=runs,
        )  # fmt: skip
        job.save(asked)
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port",
            _free_port(), "-m", "draftcache.tools.bench.parts.scale_training", str(asked), str(answer),
        ]  # fmt: skip
        code = subprocess.run(
            command, check=False, env=os.environ | {"OMP_NUM_THREADS": _threads(self._device)}
        ).returncode
        rmtree(output, ignore_errors=True)
        if code:
            raise WorkerError(f"expected {ranks} ranks to train, found exit code {code} of torchrun; see above")
        files = [answer.with_suffix(f".{rank}.json") for rank in range(ranks)]
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def step_figures(reports: list[dict[str, Any]], warm_up: int) -> tuple[dict[str, float], float]:
    """Return a run's metrics and the seconds waited, by the ranks' reports; the first `warm_up` steps are left out.

    With c[r, s] the seconds that rank r computed in step s and m[s] their largest: a rank waits m[s] - c[r, s] in a
    step. `waiting_share` is the sum of that over the sum of m[s] for every rank.
    """
    computed = np.array([report["computed"][warm_up:] for report in reports])
    slowest = computed.max(axis=0)
    waited = float((slowest - computed).sum())
    steps, ends = reports[0]["steps"][warm_up:], reports[0]["ends"]
    seconds = ends[-1] - ends[warm_up - 1]
    for_data = sum(step["data_wait_share"] * step["tokens"] / step["tokens_per_second"] for step in steps)
    metrics = {
        "tok_s": sum(step["tokens"] for step in steps) / seconds,
        "waiting_share": waited / float(slowest.sum() * len(reports)),
        "data_wait_share": for_data / seconds,
    }
    return metrics, waited


def loss_difference(found: list[float], expected: list[float]) -> float:
    """Return the largest relative difference of two runs' losses, step by step."""
    return float(np.max(np.abs(np.array(found) / np.array(expected) - 1)))


def _free_port() -> str:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _threads(device: str) -> str:
    """Return the threads of a rank's host operations: few where GPUs compute, one where ranks share the cores."""
    return "1" if device == "cpu" else "4"
