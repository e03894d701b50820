"""One worker's share of a job: it captures any shard that is free, until no shard is missing."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from draftcache.capture.job.progress import Line, Report, ShardAdvanced, ShardDone
from draftcache.capture.job.shard_capture import ShardCapture, ShardRunning
from draftcache.capture.job.work_plan import WorkPlan
from draftcache.store.common.stopping import StopRequest
from draftcache.store.format.commits import read_record
from draftcache.store.format.index import INDEX_RECORD
from draftcache.store.format.teacher_stats import describe
from draftcache.store.shard_in_progress import ShardInProgress
from draftcache.store.writer import StoreWriter

POLL_S = 0.5
"""Seconds that a worker without a free shard waits before it looks again for commits and for locks that were freed."""


@dataclass(frozen=True)
class WorkerRole:
    """Which of a command's `count` workers this is, where it reports to, and the request that stops it."""

    report: Report
    stop: StopRequest
    number: int = 0
    count: int = 1


class ShardWorker:
    """Takes free shards in order, each worker from another first shard on, and round to the shards before it.

    On a disk the shard of another worker is locked, so a worker skips it, and waits for the last ones at the end; the
    lock of a dead process is free at once. Object stores have no locks: there two workers may capture the same shard,
    and the first commit counts. The other worker then goes on from a random shard, so that the two don't capture the
    same shards from there on.
    """

    def __init__(
        self,
        work: WorkPlan,
        shards: ShardCapture,
        writer: StoreWriter,
        role: WorkerRole,
        provenance: Callable[[], dict[str, Any]],
    ) -> None:
        self._work = work
        self._shards = shards
        self._writer = writer
        self._role = role
        self._provenance = provenance
        self._start = role.number / role.count if writer.storage.local_root is not None else random.random()
        self._began: float | None = None

    def run(self) -> None:
        """Return when no shard is missing and the index is written. Raises Stopped."""
        if self._missing() and read_record(self._writer.storage, INDEX_RECORD) is not None:
            self._writer.discard_index()  # a damaged shard was removed since
        while missing := self._missing():
            if not self._round(missing):
                self._role.stop.wait(POLL_S)
        self._writer.finish()

    def _missing(self) -> list[int]:
        """Shards without a commit record, from this worker's first shard on, and round."""
        done = self._writer.committed()
        first = int(self._start * len(self._work.shards))
        order = [*range(first, len(self._work.shards)), *range(first)]
        return [shard for shard in order if shard not in done]

    def _round(self, missing: list[int]) -> bool:
        """Capture the shards of `missing` that are free; returns whether there was one.

        The device begins a shard while the shard before is still being written, so it never waits for a commit.
        """
        stop = self._role.stop
        open_shards: list[_OpenShard] = []
        worked = False
        with stop.unit():
            try:
                for shard in missing:
                    if stop.asked:
                        break
                    with stop.undivided():  # so that what was begun can be abandoned
                        begun = self._writer.shard(shard)
                        if begun is None:
                            continue
                        progress = _ShardProgress(shard, self._role)
                        running = ShardRunning(self._shards, begun, self._work.shards[shard], progress)
                        open_shards.append(_OpenShard(begun, running))
                    worked = True
                    self._began = self._began or time.monotonic()
                    running.compute()
                    if len(open_shards) > 1 and not self._settle(open_shards):
                        self._start = random.random()
                        break
                while open_shards:
                    self._settle(open_shards)
            finally:
                for item in open_shards:
                    item.abandon()
        return worked

    def _settle(self, open_shards: list[_OpenShard]) -> bool:
        """Wait until the first open shard is written and commit it; returns whether this commit is the one that counts.

        It does not count where another worker has committed the same shard before.
        """
        begun, running = open_shards[0].begun, open_shards[0].running
        plan = self._work.shards[begun.number]
        with self._shards.waiting() if len(open_shards) > 1 else nullcontext():  # behind the last shard nothing waits
            summary = running.finish()
        record = {
            "tokens": plan.tokens,
            "quarantined": summary.quarantined,
            "gates": summary.norms,
            "tail_mass": describe(np.concatenate(summary.tails) if summary.tails else np.empty(0)),
            "provenance": self._provenance(),
        }
        with self._role.stop.undivided(), begun:
            kept = begun.commit(record)
        open_shards.pop(0)
        assert self._began is not None
        self._role.report(
            ShardDone(
                shard=begun.number,
                kept=kept,
                tokens=plan.tokens,
                payload_bytes=begun.payload_bytes,
                quarantined=len(summary.quarantined),
                seconds=time.monotonic() - self._began,
                waited_seconds=self._shards.waited_s,
            )
        )
        return kept


@dataclass
class _OpenShard:
    """A shard that was begun and is not committed yet."""

    begun: ShardInProgress
    running: ShardRunning

    def abandon(self) -> None:
        """Remove all that was written of the shard, unless its commit record exists already."""
        self.running.abandon()
        with self.begun:
            pass


class _ShardProgress:
    """Reports the progress of one shard as the worker's events. Implements `progress.Progress`."""

    def __init__(self, shard: int, role: WorkerRole) -> None:
        self._shard = shard
        self._role = role
        self._tokens = 0

    def advance(self, tokens: int, payload_bytes: int) -> None:
        self._tokens += tokens
        self._role.report(ShardAdvanced(shard=self._shard, tokens=self._tokens, payload_bytes=payload_bytes))
        self._role.stop.check()

    def say(self, line: str) -> None:
        self._role.report(Line(line))
