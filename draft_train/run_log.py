"""The log of a training run: run.json, metrics.jsonl, a progress bar and, if asked for, a tracker.

run.json says what made the run: its settings, the hashes of its store and draft vocabulary, the code's version and
commit, and every command line that began it or went on with it.
"""

from __future__ import annotations

import json
import math
import shlex
import sys
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.tracking import open_tracker
from draftcache.store.common.checkout import code_commit, code_version
from draftcache.store.common.files import atomic_path, read_json, write_json
from draftcache.store.common.progress import progress_bar

METRICS = "metrics.jsonl"
"""File in a run's directory with a record of each step."""
RUN_NAME = "run.json"
"""File in a run's directory that says what made the run."""

_WORTH_SAYING = 0.03
"""Share of the wall time waited for data above which the progress bar mentions it."""


class RunLog:
    """Writes one record per optimizer step. It is a context manager, which closes the file at its end."""

    def __init__(
        self,
        config: TrainConfig,
        facts: dict[str, Any],
        *,
        step: int,
        total_steps: int,
        epoch_tokens: int,
        bar: bool = True,
    ) -> None:
        """`step` optimizer steps are done. Records of later steps, which a killed run left, are dropped.

        `facts` are written to run.json, beside the settings. `bar` shows the progress. Raises InputError where --track
        needs a package that is not installed.
        """
        path = config.output / METRICS
        _trim_metrics(path, step)
        self._total_steps = total_steps
        self._tracker = open_tracker(config, _write_run(config, facts))
        self._metrics = path.open("a", encoding="utf-8")
        tokens = epoch_tokens * config.epochs
        done = int(tokens * step / total_steps)
        self._bar = progress_bar(total=tokens, initial=done, unit="tok", unit_scale=True, desc="train", disable=not bar)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._metrics.close()
        self._bar.close()
        if self._tracker is not None:
            self._tracker.finish(failed=kind is not None)

    def write(self, record: dict[str, Any]) -> None:
        """Write the `record` of one step, as `step_record` makes it."""
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        if self._tracker is not None:
            self._tracker.log(record)
        text = f"step {record['step']}/{self._total_steps} loss {record['loss']:.3f}"
        if record["data_wait_share"] > _WORTH_SAYING:
            text += f", waiting for data {record['data_wait_share']:.0%}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(record["tokens"])


def step_record(
    step: int, figures: list[float], *, rate: float, norm: float, tokens: int, seconds: float, waited: float
) -> dict[str, Any]:
    """Return what is logged of optimizer step `step`, counted from 1.

    `figures` is `ObjectiveResult.packed()` as a list, `rate` the learning rate, `norm` the gradient norm, `seconds` the
    step's wall time, of which `waited` went into waiting for data.
    """
    loss, tail_mass, tail_positions, *by_step = figures
    rows, losses, hits = np.array(by_step).reshape(3, -1)
    taken = rows > 0
    return {
        "step": step,
        "loss": loss,
        "learning_rate": rate,
        "grad_norm": norm,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "data_wait_share": waited / seconds,
        "tail_mass": tail_mass / max(1.0, tail_positions),
        "step_loss": (losses[taken] / rows[taken]).tolist(),
        "step_accuracy": (hits[taken] / rows[taken]).tolist(),
    }


def read_records(run: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the records of a run's metrics.jsonl, and how many whole lines are none.

    The last line may be half written, as the run may be going on.
    """
    path = run / METRICS
    if not path.is_file():
        return [], 0
    rows, damaged = [], 0
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and _is_number(row.get("step")):
            rows.append(row)
        else:
            damaged += number < len(lines) - 1
    return rows, damaged


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _write_run(config: TrainConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """Write run.json, and return its content. A run that goes on keeps its id, and adds its command line."""
    path = config.output / RUN_NAME
    before = read_json(path) if path.is_file() else {}
    content = {
        "id": before.get("id", uuid.uuid4().hex),
        "commands": [*before.get("commands", []), " ".join(map(shlex.quote, sys.argv))],
        "draftcache": code_version(),
        "commit": code_commit(),
        "torch": torch.__version__,
        **facts,
        "settings": config.to_json(),
    }
    write_json(path, content)
    return content


def _trim_metrics(path: Path, step: int) -> None:
    """Drop what a killed run logged after the checkpoint that is resumed, so that every step is logged once."""
    if not path.is_file():
        return
    kept, damaged = [], 0
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line.rstrip(b"\n") + b"\n")
        except (ValueError, LookupError, TypeError):
            damaged += number < len(lines) - 1 or line.endswith(b"\n")  # else the kill cut it off
    if damaged:
        print(f"{path}: {damaged} lines are no records of steps, and are left out from now on", file=sys.stderr)
    with atomic_path(path) as partial:
        partial.write_bytes(b"".join(kept))
