"""Training of `draftcache.tools.bench.scale` by one of several ranks, with the time that it computes in every step.

`torchrun --nproc-per-node N -m draftcache.tools.bench.parts.scale_training SETTINGS REPORT` writes a store, each rank a
part of its shards, or makes the training runs of `SETTINGS`, as `draftcache train` does. A rank's seconds of a step go
from its first micro-batch's arrival on the device to its last gradient, by CUDA events: neither waiting for data nor
the sums over ranks are part of them.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.ranks import Ranks, joined_ranks
from draftcache.draft_train.run_log import METRICS
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.files import write_json
from draftcache.tools.bench.parts.scale_shapes import SHAPES
from draftcache.tools.bench.parts.scale_store import write_part


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run of a report."""

    name: str
    splits: list[str]
    order: str
    epochs: int
    batch: int
    """Conversations of a step, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """What N ranks do: `write` the store's shards, or make `runs` on it."""

    shape: str
    device: str
    store: str
    output: str
    write: bool
    runs: list[Run]

    @classmethod
    def load(cls, path: Path) -> TrainingJob:
        """Read what `save` has written."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(**values | {"runs": [Run(**run) for run in values["runs"]]})

    def save(self, path: Path) -> None:
        """Write the job as JSON."""
        write_json(path, asdict(self))


class TimedTrainer(Trainer):
    """A training run that keeps how long this rank computed in each step, and when the step was over."""

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        super().__init__(config, ranks)
        self.ends: list[float] = []
        self._spans: list[tuple[Any, Any]] = []
        self._began: Any = None
        self._add, self._close, self._finish = self.learner.add, self.learner.close, self.finish_step
        for name, timed in (("add", self._timed_add), ("close", self._timed_close)):
            setattr(self.learner, name, timed)

    def _timed_add(self, batch: Any, *, last: bool) -> None:
        self._began = self._began or self._now()
        self._add(batch, last=last)

    def _timed_close(self, mine: list[float]) -> None:
        now = self._now()
        self._spans.append((self._began or now, now))  # a rank without a conversation in this step computes nothing
        self._began = None
        self._close(mine)

    def finish_step(self, *arguments: Any, **named: Any) -> Any:
        """Note the time of a step's end, which the host has waited for."""
        self.ends.append(time.perf_counter())
        return super().finish_step(*arguments, **named)

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def computed(self) -> list[float]:
        """Return the seconds that this rank computed in each step."""
        if self.device.type != "cuda":
            return [end - began for began, end in self._spans]
        torch.cuda.synchronize(self.device)
        return [began.elapsed_time(end) / 1e3 for began, end in self._spans]


def main() -> None:
    """Do this rank's part of the job, and write its report beside those of the other ranks."""
    job, report = TrainingJob.load(Path(sys.argv[1])), Path(sys.argv[2])
    shape = SHAPES[job.shape]
    with joined_ranks(job.device) as ranks:
        if job.write:
            write_part(Path(job.store), shape, ranks)
            ranks.meet()
        found = {run.name: _train(run, job, ranks) for run in job.runs}
        write_json(report.with_suffix(f".{ranks.rank}.json"), found)


def _train(run: Run, job: TrainingJob, ranks: Ranks) -> dict[str, Any]:
    """Make one run and return this rank's seconds; rank 0 adds the records of the steps."""
    draft, output = SHAPES[job.shape].draft, Path(job.output) / run.name
    trainer = TimedTrainer(
        TrainConfig(
            store=job.store, output=output, splits=tuple(run.splits), order=run.order, epochs=run.epochs,
            device=job.device, batch_conversations=run.batch, checkpoint_every=1_000_000,
            num_attention_heads=draft.num_attention_heads, num_key_value_heads=draft.num_key_value_heads,
            head_dim=draft.head_dim,
            sliding_window=draft.sliding_window or 0, intermediate_size=draft.intermediate_size,
        ),
        ranks,
    )  # fmt: skip
    trainer.run()
    found: dict[str, Any] = {"computed": trainer.computed(), "ends": trainer.ends}
    if ranks.leads:
        lines = (output / METRICS).read_text(encoding="utf-8").splitlines()
        found["steps"] = [json.loads(line) for line in lines]
    del trainer
    gc.collect()
    if ranks.device.type == "cuda":
        torch.cuda.empty_cache()
    return found


if __name__ == "__main__":
    main()
