"""Training loops: one run, or several runs side by side on one reading of the store.

Runs that agree on what they read and in which order (`TrainConfig.reading`) can share it: every micro-batch is read
and decompressed once, and each run gets the batch that it would have made alone. Runs that need the same rows share
the batch itself; runs that differ in window, unrolled steps or draft vocabulary cut their own out of the same arrays.
Each run ends with the same bits as alone. Runs on one device take turns within a step; runs on different devices
compute at the same time, as the host waits for none of them before all have their work.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

from draftcache.draft_train.data.order import StepPlan
from draftcache.draft_train.data.prefetch import Part, Prefetcher, ring_bytes
from draftcache.draft_train.held_out import acceptance_lengths
from draftcache.draft_train.training_run import TrainingRun, TrainingStopped
from draftcache.store.common.device import as_current
from draftcache.store.common.errors import DraftcacheError, InputError

Steps = Sequence[tuple[TrainingRun, dict[str, Any]]]
"""Runs that have just made a step, and the record of each."""
Verdict = Callable[[Steps], Sequence[bool]]
"""Returns, for each run of a step that several have made, whether it goes on. It is asked after every step."""


def _all_go_on(steps: Steps) -> list[bool]:
    return [True] * len(steps)


def train_side_by_side(trainers: Sequence[TrainingRun], goes_on: Verdict = _all_go_on) -> list[DraftcacheError | None]:
    """Train every run from where it is to its end, or to where `goes_on` ends it, with a checkpoint there.

    Returns, for each run, the error that ended it, or None. The other runs go on where one fails. Raises InputError
    where the runs read different data, and TrainingStopped, after every run was saved, if a stop was asked for.
    """
    require_same_reading(trainers)
    return _SideBySide(trainers, goes_on).run()


def require_same_reading(trainers: Sequence[TrainingRun]) -> None:
    """Raise InputError, which names the setting, where two of the runs don't read the same data in the same order."""
    first = trainers[0]
    for other in trainers[1:]:
        theirs = other.config.reading() | {"store": other.store.manifest.hash}
        for name, value in (first.config.reading() | {"store": first.store.manifest.hash}).items():
            if theirs[name] != value:
                raise InputError(
                    f"{other.config.output}: expected the {name} of {first.config.output}, {value!r}, to train side "
                    f"by side with it, found {theirs[name]!r}; train it by itself"
                )


def read_ahead(trainers: Sequence[TrainingRun], first: int) -> Prefetcher:
    """Return a reader of the micro-batches of step `first` and all later ones, which serves each run its own."""
    lead = trainers[0]
    parts = (
        Part(part, 1 / len(plan.conversations), plan.epoch)
        for plan in lead.schedule.steps(first)
        for part in plan.parts
    )
    loaders = [item.loader for item in trainers]
    most = int(max(item.config.prefetch_gb for item in trainers) * 1e9)
    room = ring_bytes(lead.store, loaders, lead.schedule, most)
    return Prefetcher(lead.store, loaders, parts, [item.device for item in trainers], most_bytes=room)


class _SideBySide:
    """The loop over the steps of several runs."""

    def __init__(self, trainers: Sequence[TrainingRun], goes_on: Verdict) -> None:
        self.trainers = list(trainers)
        self.goes_on = goes_on
        self.errors: dict[int, DraftcacheError] = {}
        """By position in `trainers`, what ended a run."""
        self.ended: set[int] = {number for number, item in enumerate(self.trainers) if item.step >= item.total_steps}
        self.stopped: TrainingStopped | None = None

    def run(self) -> list[DraftcacheError | None]:
        """Train to the end; see `train_side_by_side`."""
        if len(self.ended) < len(self.trainers):
            with ExitStack() as stack:
                logs = [stack.enter_context(self._log(item)) for item in self.trainers]
                self._run_steps(stack, logs)
        return [self.errors.get(number) for number in range(len(self.trainers))]

    def _log(self, trainer: TrainingRun) -> AbstractContextManager[Any]:
        return trainer.log(bar=len(self.trainers) == 1) if trainer.step < trainer.total_steps else nullcontext()

    def _run_steps(self, stack: ExitStack, logs: list[Any]) -> None:
        first = min(item.step for number, item in enumerate(self.trainers) if number not in self.ended)
        schedule = self.trainers[0].schedule
        data = stack.enter_context(read_ahead(self.trainers, first))
        for number, plan in enumerate(schedule.steps(first), first):
            active = [at for at, item in enumerate(self.trainers) if at not in self.ended and item.step == number]
            if active:
                self._train_step(plan, data, active, logs)
            if self.stopped is not None:
                raise self.stopped
            if len(self.ended) == len(self.trainers):
                return

    def _train_step(self, plan: StepPlan, data: Prefetcher, active: list[int], logs: list[Any]) -> None:
        started, waited = time.monotonic(), data.waited
        for left in reversed(range(len(plan.parts))):
            batches = data.next_batches()
            for at in self._left(active):
                with self._own(at) as trainer:
                    trainer.learner.add(batches[at], last=left == 0)
        for at in self._left(active):
            with self._own(at) as trainer:
                trainer.close_step(data.waited - waited)
        records: dict[int, dict[str, Any]] = {}
        for at in self._left(active):
            with self._own(at) as trainer:
                records[at] = trainer.end_step(plan, started)
        for at, length in self._evaluate(list(records)).items():
            records[at]["eval_acceptance_length"] = length
        verdicts = self.goes_on([(self.trainers[at], record) for at, record in records.items()])
        for (at, record), goes_on in zip(records.items(), verdicts, strict=True):
            with self._own(at):
                self._finish(at, record, logs[at], last=not goes_on)

    def _left(self, active: list[int]) -> list[int]:
        return [at for at in active if at not in self.ended]

    def _evaluate(self, active: list[int]) -> dict[int, float]:
        """Return the acceptance lengths of the runs whose evaluation is due. Those that can share a reading do."""
        waiting = [at for at in active if self.trainers[at].evaluation_due()]
        found: dict[int, float] = {}
        while waiting:
            together = [at for at in waiting if self.trainers[at].evaluates_like(self.trainers[waiting[0]])]
            lengths = acceptance_lengths([self.trainers[at] for at in together])
            found |= dict(zip(together, lengths, strict=True))
            waiting = [at for at in waiting if at not in together]
        return found

    @contextmanager
    def _own(self, at: int) -> Iterator[TrainingRun]:
        """Give a run, with its device as the current one. An error of one of several runs ends that run alone."""
        trainer = self.trainers[at]
        try:
            with as_current(trainer.device):
                yield trainer
        except DraftcacheError as exc:
            if len(self.trainers) == 1:
                raise
            print(f"{trainer.config.output}: this run ends: {exc}", file=sys.stderr)
            self.errors[at] = exc
            self.ended.add(at)

    def _finish(self, at: int, record: dict[str, Any], log: Any, *, last: bool) -> None:
        trainer = self.trainers[at]
        stopped = trainer.finish_step(log, record, last=last)
        if last or trainer.step >= trainer.total_steps:
            self.ended.add(at)
        elif stopped is not None:
            self.stopped = stopped
