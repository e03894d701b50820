"""The log of a training run: metrics.jsonl, a progress bar and, if asked for, Weights & Biases."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from draftcache.draft_train.config import TrainConfig
from draftcache.store.common.errors import InputError
from draftcache.store.common.files import atomic_path
from draftcache.store.common.progress import progress_bar

_WORTH_SAYING = 0.03
"""Share of the wall time waited for data above which the progress bar mentions it."""


class RunLog:
    """Writes one record per optimizer step. It is a context manager, which closes the file at its end."""

    def __init__(
        self,
        config: TrainConfig,
        store_hash: str,
        *,
        step: int,
        total_steps: int,
        epoch_tokens: int,
        bar: bool = True,
    ) -> None:
        """`step` optimizer steps are done. Records of later steps, which a killed run left, are dropped.

        `bar` shows the progress. Raises InputError where --wandb needs a package that is not installed.
        """
        path = config.output / "metrics.jsonl"
        _trim_metrics(path, step)
        self._total_steps = total_steps
        self._tracker = _wandb_run(config, store_hash)
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
            self._tracker.finish(exit_code=int(kind is not None))

    def write(self, record: dict[str, Any]) -> None:
        """Write the `record` of one step, as `step_record` makes it."""
        self._metrics.write(json.dumps(record) + "\n")
        self._metrics.flush()
        if self._tracker is not None:
            self._tracker.log(record, step=record["step"])
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


def _wandb_run(config: TrainConfig, store_hash: str) -> Any:
    if config.wandb == "off":
        return None
    try:
        import wandb
    except ImportError as exc:
        raise InputError("--wandb: expected the wandb package, found none; install draftcache[track]") from exc
    settings = config.objective() | {"store": str(config.store), "store_hash": store_hash}
    return wandb.init(
        project=config.wandb_project,
        mode=config.wandb,  # type: ignore[arg-type]  # checked by TrainConfig
        config=settings,
        dir=str(config.output),
    )
