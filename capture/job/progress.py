"""What workers tell while they work, and the one line that shows it."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias

from draftcache.capture.job.work_plan import WorkPlan
from draftcache.store.common.progress import progress_bar
from draftcache.store.format.commits import committed_shards, require_record, shard_name
from draftcache.store.storage.base import Storage

_LOOK_S = 5.0  # between looks at what other jobs have committed


class Progress(Protocol):
    """Where the capture of a shard reports to."""

    def advance(self, tokens: int, payload_bytes: int) -> None:
        """`tokens` more of the shard are done; `payload_bytes` of it are written or on their way.

        Raises Stopped where the time that was left to finish in is over.
        """

    def say(self, line: str) -> None:
        """One line for whoever watches."""


@dataclass(frozen=True)
class ShardAdvanced:
    """A worker is at `tokens` of its shard."""

    shard: int
    tokens: int
    payload_bytes: int


@dataclass(frozen=True)
class ShardDone:
    """A worker left a shard: committed (`kept`), or because another was first."""

    shard: int
    kept: bool
    tokens: int
    payload_bytes: int
    quarantined: int


@dataclass(frozen=True)
class Line:
    """Something to read."""

    text: str


Event: TypeAlias = ShardAdvanced | ShardDone | Line
Report: TypeAlias = Callable[[Event], None]


@dataclass
class CaptureSummary:
    """What the workers of one command did, and what is set aside in the store, whoever did it."""

    shards: int = 0
    tokens: int = 0
    payload_bytes: int = 0
    seconds: float = 0.0
    quarantined: list[dict[str, Any]] = field(default_factory=list)


class JobProgress:
    """One line for the whole job: tokens of all committed shards, whoever did them, and of those being worked on.

    Use as a context manager.
    """

    def __init__(self, work: WorkPlan, storage: Storage) -> None:
        self._work = work
        self._storage = storage
        self._working: dict[int, ShardAdvanced] = {}  # by worker
        self._looked = self._started = time.monotonic()
        self._summary = CaptureSummary()
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
        """Of a store that is whole, after the context's end."""
        records = (require_record(self._storage, shard_name(shard)) for shard in range(len(self._work.shards)))
        return replace(self._summary, quarantined=[item for record in records for item in record["quarantined"]])

    def _count(self, shards: Iterable[int]) -> None:
        """Take these for committed, but for such as another plan's store may have more."""
        new = {shard for shard in shards if shard < len(self._work.shards)} - self._committed
        self._committed |= new
        self._committed_tokens += self._work.tokens(new)

    def take(self, worker: int, event: Event) -> None:
        """Show what a worker did."""
        if isinstance(event, Line):
            self._bar.write(event.text, file=sys.stderr)
            return
        if isinstance(event, ShardAdvanced):
            self._working[worker] = event
        else:
            self._working.pop(worker, None)
            self._count([event.shard])
            if event.kept:
                self._summary.shards += 1
                self._summary.tokens += event.tokens
                self._summary.payload_bytes += event.payload_bytes
                self._quarantined += event.quarantined
        self.refresh()

    def drop(self, worker: int) -> None:
        """Forget the shard that a worker had when it died."""
        self._working.pop(worker, None)
        self.refresh()

    def refresh(self) -> None:
        """Now and then, look at what others have committed; then move the line."""
        if time.monotonic() - self._looked > _LOOK_S:
            self._count(committed_shards(self._storage))
            self._looked = time.monotonic()
        doing = {item.shard: item.tokens for item in self._working.values() if item.shard not in self._committed}
        written = self._summary.payload_bytes + sum(item.payload_bytes for item in self._working.values())
        self._bar.set_postfix_str(f"{written / 1e9:.2f} GB, {self._quarantined} quarantined", refresh=False)
        self._bar.update(self._committed_tokens + sum(doing.values()) - self._bar.n)
