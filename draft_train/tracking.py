"""What a run reports to Weights & Biases or TensorBoard, beside the metrics.jsonl that it always writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from draftcache.draft_train.config import TrainConfig
from draftcache.store.common.errors import InputError


class Tracker(Protocol):
    """Takes the records of a run's steps."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Report the record of one step, as `run_log.step_record` makes it."""

    def finish(self, *, failed: bool) -> None:
        """Report that no more steps follow in this process."""


def open_tracker(config: TrainConfig, facts: Mapping[str, Any]) -> Tracker | None:
    """Return the tracker of --track, or None for "off".

    `facts` is what run.json holds of the run. Raises InputError where the tracker's package is not installed.
    """
    if config.track == "off":
        return None
    return _TensorBoard(config.output, facts) if config.track == "tensorboard" else _Wandb(config, facts)


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a record by name. A list of one number per unrolled step k gives `name/k`, k from 0."""
    found: dict[str, float] = {}
    for name, value in record.items():
        parts = {f"{name}/{number}": item for number, item in enumerate(value)} if isinstance(value, list) else None
        found |= {name: value} if parts is None else parts
    return found


class _Wandb:
    """A run of Weights & Biases. A run that is resumed goes on in the same one."""

    def __init__(self, config: TrainConfig, facts: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as exc:
            raise InputError("--track: expected the wandb package, found none; install draftcache[track]") from exc
        self._run = wandb.init(
            project=config.track_project,
            group=config.track_group or None,
            name=config.output.name,
            id=str(facts["id"]),
            resume="allow",
            mode="offline" if config.track == "wandb-offline" else "online",
            config=dict(facts),
            dir=str(config.output),
        )

    def log(self, record: Mapping[str, Any]) -> None:
        self._run.log(scalars(record), step=record["step"])

    def finish(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _TensorBoard:
    """Event files in the folder `tensorboard` of the run's directory."""

    def __init__(self, output: Path, facts: Mapping[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as exc:
            raise InputError(
                "--track: expected the tensorboard package, found none; install draftcache[track]"
            ) from exc
        self._writer = SummaryWriter(str(output / "tensorboard"))
        lines = "\n".join(f"    {name}: {value}" for name, value in facts.items())
        self._writer.add_text("run", lines)

    def log(self, record: Mapping[str, Any]) -> None:
        for name, value in scalars(record).items():
            if name != "step":
                self._writer.add_scalar(name, value, record["step"])

    def finish(self, *, failed: bool) -> None:
        self._writer.close()
