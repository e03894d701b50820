"""A training run as its directory holds it: the log, the newest checkpoint's state, and evaluations beside them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftcache.draft_train.checkpoint import best_checkpoint, checkpoints
from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.drafts.protocol import CheckpointState
from draftcache.draft_train.run_log import METRICS, RUN_NAME, read_records
from draftcache.draft_train.state_file import read_state
from draftcache.store.common.errors import DraftcacheError
from draftcache.store.common.files import read_json

_GOING = 900.0
"""Seconds since the last record within which an unfinished run is taken to be going on."""


@dataclass(frozen=True)
class Run:
    """One training run."""

    name: str
    path: Path
    metrics: list[dict[str, Any]]
    """Records of `draft_train.run_log.step_record`, in order of steps."""
    state: CheckpointState | None
    """Of the newest checkpoint; None before the first."""
    record: dict[str, Any]
    """Content of run.json: commands, versions, commit; empty for runs of earlier versions."""
    silent: float | None
    """Seconds since the last record was written; None where there is none."""
    notes: list[str] = field(default_factory=list)
    """What could not be read."""
    axes: dict[str, Any] = field(default_factory=dict)
    """Values of a sweep's axes."""

    @property
    def step(self) -> int:
        """The last step that was logged or saved."""
        logged = int(self.metrics[-1]["step"]) if self.metrics else 0
        return max(logged, self.state.step if self.state else 0)

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.state is not None and self.state.finished

    @property
    def status(self) -> str:
        """What the page says of an unfinished run."""
        if self.finished:
            return f"finished at step {self.step:,}"
        if self.silent is None:
            return "not begun: no step is logged yet"
        total = self.record.get("total_steps")
        step = f"step {self.step:,}" + (f" of {total:,}" if _is_number(total) else "")
        ago = f"{self.silent:.0f} s" if self.silent < 120 else f"{self.silent / 60:.0f} min"
        if self.silent < _GOING:
            return f"still going: {step}, last record {ago} ago. All figures of it are of this moment."
        return f"not finished: {step}, last record {ago} ago. The same command would go on from there."

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """Return the steps and values of a key of the log, where it was logged."""
        rows = [(float(row["step"]), float(row[name])) for row in self.metrics if _is_number(row.get(name))]
        return [step for step, _ in rows], [value for _, value in rows]

    def columns(self, name: str) -> list[tuple[list[float], list[float]]]:
        """Return the same for each unroll step of a key that holds a list."""
        steps = max((len(row[name]) for row in self.metrics if isinstance(row.get(name), list)), default=0)
        found: list[tuple[list[float], list[float]]] = [([], []) for _ in range(steps)]
        for row in self.metrics:
            for number, value in enumerate(row.get(name) or []):
                found[number][0].append(float(row["step"]))
                found[number][1].append(float(value))
        return found

    @property
    def best(self) -> tuple[int, float] | None:
        """Step and length of the longest acceptance that was measured while training."""
        steps, values = self.column("eval_acceptance_length")
        if not values:
            return None
        place = max(range(len(values)), key=lambda number: values[number])
        return int(steps[place]), values[place]

    @property
    def commands(self) -> list[str]:
        """The commands that began the run and went on with it.

        For a run of an earlier version, which kept none, one is made of the settings of its checkpoint.
        """
        if isinstance(kept := self.record.get("commands"), list):
            return [str(command) for command in kept]
        if self.state is None:
            return []
        defaults, words = TrainConfig.objective_defaults(), ["draftcache train --store STORE"]
        for name, value in self.state.objective.items():
            if name == "splits" or value != defaults.get(name):
                text = ",".join(map(str, value)) if isinstance(value, list | tuple) else f"{value}"
                words.append(f"--{name.replace('_', '-')} {text}")
        return [" ".join([*words, f"--output {self.path}"])]


def is_run(path: Path) -> bool:
    """Return whether a directory is that of a training run."""
    return (path / METRICS).is_file() or (path / "checkpoints").is_dir()


def read_run(path: Path, name: str, axes: dict[str, Any] | None = None) -> Run:
    """Read a run's directory, which a run may be writing at this moment. What can't be read becomes a note."""
    notes: list[str] = []
    metrics, damaged = read_records(path)
    if damaged:
        notes.append(f"{path / METRICS}: {damaged} lines are no records of steps, and are left out")
    state: CheckpointState | None = None
    for checkpoint in reversed(checkpoints(path)):
        try:
            state = read_state(checkpoint)[0]
            break
        except (DraftcacheError, OSError) as exc:  # it may have been pruned since
            if checkpoint.exists():
                notes.append(str(exc))
    try:
        best_checkpoint(path)
    except DraftcacheError as exc:
        notes.append(str(exc))
    file = path / METRICS
    silent = max(0.0, time.time() - file.stat().st_mtime) if metrics else None
    record = _read_record(path / RUN_NAME, notes)
    return Run(
        name=name, path=path, metrics=metrics, state=state, record=record, silent=silent, notes=notes, axes=axes or {}
    )


def _read_record(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        found = read_json(path) if path.is_file() else {}
    except (OSError, ValueError) as exc:
        notes.append(f"{path}: could not be read ({exc})")
        return {}
    return found if isinstance(found, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
