"""Runs a sweep's groups as trials of Ray Tune on an existing cluster, whose nodes share the sweep's directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from draftcache.store.common.errors import InputError, WorkerError
from draftcache.store.common.ray_cluster import connected_ray
from draftcache.tools.sweep.plan import Sweep


def run_on_ray(sweep: Sweep, output: Path, workers: int, side_by_side: int, device: str) -> None:
    """Run every group of the sweep as one trial of Ray Tune, on a GPU of its own where the cluster has any.

    `workers` bounds the groups that run at once; 0 leaves it to the cluster. Early ends are decided by the sweep's own
    rungs, since trials of one group share a process. Raises InputError without Ray or a cluster, and WorkerError where
    groups failed, after all have had their turn.
    """
    with connected_ray() as ray:
        try:
            from ray import tune
        except ImportError as exc:
            raise InputError("--launcher ray: expected Ray Tune, found none; install draftcache[ray]") from exc
        gpus = ray.cluster_resources().get("GPU", 0) > 0 and device != "cpu"
        folder, kind = str(output.absolute()), "cuda" if gpus else "cpu"

        def train(config: Mapping[str, Any]) -> None:  # sent by value, with the four plain values that it holds
            from draftcache.tools.sweep.ray_tune import train_as_task

            train_as_task(int(config["group"]), output=folder, side_by_side=side_by_side, device=kind)

        found = tune.Tuner(
            tune.with_resources(train, {"gpu": 1} if gpus else {"cpu": 1}),
            param_space={"group": tune.grid_search(list(range(len(sweep.groups))))},
            tune_config=tune.TuneConfig(max_concurrent_trials=workers or None),
            run_config=tune.RunConfig(name="sweep", storage_path=str((output / "ray").absolute()), verbose=0),
        ).fit()
    if found.errors:
        raise WorkerError(
            f"expected every group of trials to be trained, found {len(found.errors)} that failed, the first with "
            f"{found.errors[0]}; what was saved stays: run the same command again to go on"
        )


def train_as_task(group: int, *, output: str, side_by_side: int, device: str) -> None:
    """Train one group where Ray has put it. Ray shows a task no GPUs but its own."""
    from draftcache.store.common.stopping import StopRequest
    from draftcache.tools.sweep.worker import train_group

    names = [f"cuda:{number}" for number in range(torch.cuda.device_count())] if device == "cuda" else ["cpu"]
    train_group(Path(output), group, [torch.device(name) for name in names], side_by_side, StopRequest())
