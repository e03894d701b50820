"""One capture by `local_workers`, the workers of `draftcache capture --workers N`, with the time of every report.

`python -m draftcache.tools.bench.parts.scale_job SETTINGS REPORT` reads `Job` as JSON and writes what `Watched` has
seen. It is a process of its own because workers are spawned from it, and one of them may be killed by it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.local_workers import run_processes
from draftcache.capture.job.progress import Event, JobProgress, Line, ShardAdvanced, ShardDone
from draftcache.capture.job.work_plan import WorkPlan
from draftcache.store.common.errors import DraftcacheError, WorkerError
from draftcache.store.common.files import write_json
from draftcache.store.common.stopping import StopRequest
from draftcache.store.storage.base import open_storage


@dataclass(frozen=True, kw_only=True)
class Job:
    """A capture by `workers` processes. `kill_after` is the share of tokens at which one is killed; 0: never."""

    settings: dict[str, Any]
    """Fields of `CaptureConfig`; paths as text."""
    workers: int
    kill_after: float = 0.0

    def config(self) -> CaptureConfig:
        """Return the capture's settings."""
        paths = {name: Path(self.settings[name]) for name in ("verifier", "dataset", "output")}
        return CaptureConfig(**self.settings | paths | {"layers": tuple(self.settings["layers"])})


@dataclass
class Worker:
    """What one worker has reported; times are those of `time.time`."""

    began: float
    """When its first conversations were given to the device."""
    commits: list[tuple[float, int]]
    """Time and tokens of each shard that it committed."""
    seconds: float = 0.0
    """From its first shard's begin to its last one's commit."""
    waited_seconds: float = 0.0
    """Those for which its device waited until what it had computed was written."""


class Watched(JobProgress):
    """A job's progress that also keeps the time of every report, and kills a worker where it is told to."""

    def __init__(self, work: WorkPlan, output: Path, job: Job) -> None:
        super().__init__(work, open_storage(output))
        self.workers: dict[int, Worker] = {}
        self.started = time.time()
        self.killed: dict[str, float] | None = None
        self._job = job
        self._total = work.tokens(range(len(work.shards)))

    def take(self, worker: int, event: Event) -> None:
        """Keep the event's time, then show it."""
        now = time.time()
        if isinstance(event, ShardAdvanced) and worker not in self.workers:
            self.workers[worker] = Worker(began=now, commits=[])
        if isinstance(event, ShardDone) and event.kept:
            found = self.workers[worker]
            found.commits.append((now, event.tokens))
            found.seconds, found.waited_seconds = event.seconds, event.waited_seconds
            self._kill_where_due(now)
        if isinstance(event, Line):
            print(f"worker {worker}: {event.text}", file=sys.stderr, flush=True)
        else:
            super().take(worker, event)

    def _kill_where_due(self, now: float) -> None:
        job = self._job
        done = sum(tokens for item in self.workers.values() for _, tokens in item.commits)
        if self.killed is not None or not job.kill_after or done < job.kill_after * self._total:
            return
        victim = job.workers - 1
        # Processes are named in the order in which they were started.
        process = sorted(multiprocessing.active_children(), key=lambda item: int(item.name.rpartition("-")[2]))[victim]
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        self.killed = {"worker": victim, "time": now}

    def report(self) -> dict[str, Any]:
        """Return all that was seen, as JSON values."""
        workers = {str(number): asdict(item) for number, item in sorted(self.workers.items())}
        return {"started": self.started, "workers": workers, "killed": self.killed}


def main() -> None:
    """Run the capture and write the report."""
    job = Job(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    config = job.config()
    assert isinstance(config.output, Path)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    with Watched(WorkPlan.of(config), config.output, job) as progress:
        run_processes(config, job.workers, progress, StopRequest(config.grace_seconds))
    if job.kill_after and progress.killed is None:
        raise WorkerError("expected to kill a worker in the middle of the job, found none to kill")
    write_json(Path(sys.argv[2]), progress.report())


if __name__ == "__main__":
    try:
        main()
    except DraftcacheError as exc:
        sys.exit(f"{__spec__.name}: error: {exc}")
