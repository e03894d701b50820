"""Events that workers report, and the one progress line of the whole job."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias

from draftcache.capture.job.work_plan import WorkPlan
from draftcache.store.common.progress import progress_bar
from draftcache.store.format.commits import committed_shards, require_record, shard_name
from draftcache.store.storage.asking import ask_side_by_side
from draftcache.store.storage.base import Storage

_LOOK_S = 5.0  # between two listings of the shards that other jobs have committed


class Progress(Protocol):
    """Receives the progress of one shard's capture."""

    def advance(self, tokens: int, payload_bytes: int) -> None:
        """Count `tokens` more of the shard as done; `payload_bytes` of the shard are written or being written.

        Raises Stopped where the job was told to stop and the grace is over.
        """

    def say(self, line: str) -> None:
        """Show one line of text to the user."""


@dataclass(frozen=True)
class ShardAdvanced:
    """A worker has captured `tokens` of its shard so far."""

    shard: int
    tokens: int
    payload_bytes: int


@dataclass(frozen=True)
class ShardDone:
    """A worker has ended its work on a shard: it committed it (`kept`), or another worker's commit was first."""

    shard: int
    kept: bool
    tokens: int
    payload_bytes: int
    quarantined: int
    seconds: float
    """Since the worker has begun its first shard."""
    waited_seconds: float
    """Those of them for which the device was given nothing, because what it had computed was not written yet."""


@dataclass(frozen=True)
class Line:
    """One line of text for the user."""

    text: str


Event: TypeAlias = ShardAdvanced | ShardDone | Line
Report: TypeAlias = Callable[[Event], None]


@dataclass
class CaptureSummary:
    """Totals of one command's workers, and all quarantined conversations of the store, of any command."""

    shards: int = 0
    tokens: int = 0
    payload_bytes: int = 0
    seconds: float = 0.0
    waiting_share: float = 0.0
    """Share of the workers' time for which their devices waited until what they had computed was written."""
    quarantined: list[dict[str, Any]] = field(default_factory=list)


class JobProgress:
    """The progress line of the whole job: tokens of all committed shards, of any job, and of the shards in progress.

    Use as a context manager.
    """

    def __init__(self, work: WorkPlan, storage: Storage) -> None:
        self._work = work
        self._storage = storage
        self._working: dict[int, ShardAdvanced] = {}  # by worker
        self._looked = self._started = time.monotonic()
        self._summary = CaptureSummary()
        self._times: dict[int, ShardDone] = {}  # the last of each worker
        self._quarantined = 0
        self._committed: set[int] = set()
        self._committed_tokens = 0
        self._count(committed_shards(storage))
        everything, done = work.tokens(range(len(work.shards))), self._committed_tokens
        self._bar: Any = progress_bar(
            total=everything, initial=done, unit="tok", unit_scale=True, desc="capture", disable=done == everything
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._summary.seconds = time.monotonic() - self._started
        self._bar.close()

    def summary(self) -> CaptureSummary:
        """The command's summary, after the context has ended; the store must be whole."""
        names = map(shard_name, range(len(self._work.shards)))
        records = ask_side_by_side(self._storage, partial(require_record, self._storage), names)
        seconds = sum(item.seconds for item in self._times.values())
        waited = sum(item.waited_seconds for item in self._times.values())
        return replace(
            self._summary,
            waiting_share=waited / seconds if seconds else 0.0,
            quarantined=[item for record in records for item in record["quarantined"]],
        )

    def _count(self, shards: Iterable[int]) -> None:
        """Count these shards as committed; numbers beyond the plan (a store of another plan) are left out."""
        new = {shard for shard in shards if shard < len(self._work.shards)} - self._committed
        self._committed |= new
        self._committed_tokens += self._work.tokens(new)

    def take(self, worker: int, event: Event) -> None:
        """Show an event of the worker of this number."""
        if isinstance(event, Line):
            self._bar.write(event.text, file=sys.stderr)
            return
        if isinstance(event, ShardAdvanced):
            self._working[worker] = event
        else:
            self._working.pop(worker, None)
            self._times[worker] = event
            self._count([event.shard])
            if event.kept:
                self._summary.shards += 1
                self._summary.tokens += event.tokens
                self._summary.payload_bytes += event.payload_bytes
                self._quarantined += event.quarantined
        self.refresh()

    def drop(self, worker: int) -> None:
        """Forget the shard in progress of a worker that died."""
        self._working.pop(worker, None)
        self.refresh()

    def refresh(self) -> None:
        """Redraw the line; every few seconds, first list the shards that other jobs have committed."""
        if time.monotonic() - self._looked > _LOOK_S:
            self._count(committed_shards(self._storage))
            self._looked = time.monotonic()
        doing = {item.shard: item.tokens for item in self._working.values() if item.shard not in self._committed}
        written = self._summary.payload_bytes + sum(item.payload_bytes for item in self._working.values())
        self._bar.set_postfix_str(f"{written / 1e9:.2f} GB, {self._quarantined} quarantined", refresh=False)
        self._bar.update(self._committed_tokens + sum(doing.values()) - self._bar.n)
