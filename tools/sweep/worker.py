"""Trains the trials of one group side by side: `python -m draftcache.tools.sweep.worker SWEEP GROUP DEVICES`.

`SWEEP` is the sweep's directory, `GROUP` the number of a group in its plan, and `DEVICES` the devices of this process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from draftcache.draft_train.checkpoint import checkpoints
from draftcache.draft_train.data.frozen import TrainingSource
from draftcache.draft_train.ranks import Ranks
from draftcache.draft_train.run_memory import USABLE, fitting, run_bytes
from draftcache.draft_train.side_by_side import Steps, train_side_by_side
from draftcache.draft_train.state_file import read_state
from draftcache.draft_train.training_run import TrainingRun, TrainingStopped
from draftcache.store.common.errors import DraftcacheError
from draftcache.store.common.failures import describe_failure, exit_code_of
from draftcache.store.common.files import read_json, write_json
from draftcache.store.common.stopping import StopRequest, asked_by_signals
from draftcache.tools.sweep.plan import PLAN_NAME, Sweep, Trial
from draftcache.tools.sweep.rungs import Rungs

FAILED = "failed.json"
"""File in a trial's directory that says why it ended."""


def train_group(
    output: Path, group: int, devices: Sequence[torch.device], side_by_side: int, stop: StopRequest
) -> None:
    """Train what is not finished of a group of a sweep's trials, as many at once as the devices' memory allows.

    `side_by_side` is the most trials at once on a device; 0 leaves it to the memory. A trial that fails leaves a file
    FAILED, and the others go on. Raises TrainingStopped if a stop was asked for, after all trials were saved.
    """
    sweep = Sweep.from_json(read_json(output / PLAN_NAME))
    trials = [sweep.trials[number] for number in sweep.groups[group]]
    ended = Rungs(output, sweep.asha).ended() if sweep.asha is not None else {}
    waiting = [trial for trial in trials if trial.name not in ended and not is_finished(trial)]
    if not waiting:
        return
    source = TrainingSource(waiting[0].config.store)
    for part in _parts(source, waiting, devices, side_by_side):
        _train(output, sweep, part, devices, source, stop)


def is_finished(trial: Trial) -> bool:
    """Return whether a trial's last optimizer step is in a checkpoint."""
    found = checkpoints(trial.config.output)
    return bool(found) and read_state(found[-1])[0].finished


def _parts(
    source: TrainingSource, trials: list[Trial], devices: Sequence[torch.device], side_by_side: int
) -> list[list[Trial]]:
    """Cut trials into parts that train one after the other, each of which reads the store once."""
    most = (side_by_side or len(trials)) * len(devices)
    parts = [trials[first : first + most] for first in range(0, len(trials), most)]
    if devices[0].type == "cuda":
        room = min(torch.cuda.mem_get_info(device)[0] for device in devices) * USABLE * len(devices)
        sizes = {trial.name: run_bytes(source.store, trial.config) for trial in trials}
        parts = [
            [part[at] for at in positions]
            for part in parts
            for positions in fitting([sizes[trial.name] for trial in part], room)
        ]
    if len(parts) > 1:
        print(
            f"draftcache sweep: {len(trials)} trials train in {len(parts)} parts, as no more fit side by side; each "
            "part reads the store once",
            file=sys.stderr,
        )
    return parts


def _train(
    output: Path,
    sweep: Sweep,
    trials: list[Trial],
    devices: Sequence[torch.device],
    source: TrainingSource,
    stop: StopRequest,
) -> None:
    names: dict[Path, str] = {}
    with ExitStack() as stack:
        runs = []
        for number, trial in enumerate(trials):
            device = devices[number % len(devices)]
            config = replace(trial.config, device=str(device))
            run = TrainingRun(config, Ranks(device), stop, source)
            stack.enter_context(run.started())
            (config.output / FAILED).unlink(missing_ok=True)  # of an earlier try
            names[config.output] = trial.name
            runs.append(run)
        rungs = Rungs(output, sweep.asha) if sweep.asha is not None else None
        steps = sweep.asha.rungs(runs[0].total_steps) if sweep.asha is not None else []

        def verdicts(made: Steps) -> list[bool]:
            step = made[0][1]["step"]
            if rungs is None or step not in steps:
                return [True] * len(made)
            lengths = {names[run.config.output]: float(record["eval_acceptance_length"]) for run, record in made}
            return list(rungs.decide(step, lengths).values())

        for trial, error in zip(trials, train_side_by_side(runs, verdicts), strict=True):
            if error is not None:
                write_json(trial.config.output / FAILED, {"error": str(error)})


def main() -> int:
    """Train the group that the command line names; return the exit code."""
    output, group, names, side_by_side = sys.argv[1:]
    devices = [torch.device(name) for name in names.split(",")]
    if devices[0].type == "cpu" and (threads := os.environ.get("OMP_NUM_THREADS")):
        torch.set_num_threads(int(threads))
    try:
        with asked_by_signals(StopRequest()) as stop:
            train_group(Path(output), int(group), devices, int(side_by_side), stop)
    except TrainingStopped as exc:
        return exc.exit_code
    except (DraftcacheError, OSError, RuntimeError) as exc:
        print(f"draftcache sweep: group {group}: {describe_failure(exc)}", file=sys.stderr)
        return exit_code_of(exc)
    return 0


if __name__ == "__main__":
    sys.exit(main())
