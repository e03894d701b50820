"""Workers as actors of an existing Ray cluster: one per GPU, or on CPU slots where the cluster has no GPUs.

Ray only starts the actors and carries their reports; which worker does which shard is settled through the store, as
with every launcher. Verifier and dataset must be at the same paths on every node, or on a file system that all nodes
share.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.progress import Event, JobProgress, Line
from draftcache.capture.job.shard_worker import WorkerRole
from draftcache.capture.job.stopping import ParentSignals, StopSteps
from draftcache.capture.job.worker_job import CaptureJob
from draftcache.store.common.errors import DraftcacheError, WorkerError
from draftcache.store.common.failures import describe_failure
from draftcache.store.common.ray_cluster import connected_ray
from draftcache.store.common.stopping import Stopped, StopRequest

_POLL_S = 0.5


class RayWorker:
    """The actor. `run` occupies one of its threads; the other methods answer on other threads meanwhile."""

    def __init__(self, config: CaptureConfig, number: int, count: int) -> None:
        self._config = config
        self._stop = StopRequest(config.grace_seconds)
        self._events: list[Event] = []
        self._lock = threading.Lock()
        self._role = WorkerRole(report=self._report, stop=self._stop, number=number, count=count)

    def _report(self, event: Event) -> None:
        with self._lock:
            self._events.append(event)

    def run(self) -> DraftcacheError | None:
        """Do this worker's share of the job; returns the error that ended it, or None."""
        try:
            with CaptureJob(self._config) as job:
                job.run_worker(self._role)
        except Stopped:
            pass
        except Exception as exc:
            return exc if isinstance(exc, DraftcacheError) else WorkerError(describe_failure(exc))
        return None

    def take_events(self) -> list[Event]:
        """The events since the last call."""
        with self._lock:
            events, self._events = self._events, []
        return events

    def ask_to_stop(self, grace_seconds: float) -> None:
        """Ask the worker to stop; the shard that it works on may take `grace_seconds` more."""
        self._stop.ask(grace_seconds)


def run_on_ray(config: CaptureConfig, progress: JobProgress, stop: StopRequest) -> None:
    """Run actors until the store is whole. An actor that dies leaves its shard to the others.

    Raises InputError without Ray or a running cluster, and Stopped after SIGTERM or SIGINT. Where no actor came to the
    end, it raises the DraftcacheError of the first that reported one, or WorkerError where none did.
    """
    with connected_ray() as ray, ParentSignals(stop):
        resources = ray.cluster_resources()
        slot = "GPU" if resources.get("GPU") else "CPU"
        slots = int(resources.get(slot, 0)) // config.tensor_parallel
        workers = config.workers or (slots if slot == "GPU" else 1)
        if workers > slots:
            progress.take(0, Line(f"{workers} workers, but the cluster has {slots} {slot} slots now: some must wait"))
        options = {"num_gpus" if slot == "GPU" else "num_cpus": config.tensor_parallel}
        actor = ray.remote(max_concurrency=4, **options)(RayWorker)
        handles = [actor.remote(_with_absolute_paths(config), number, workers) for number in range(workers)]
        try:
            _Actors(ray, handles, progress).watch(stop)
        finally:
            for handle in handles:
                ray.kill(handle)
    if stop.asked:
        raise Stopped(stop.signal_number)


class _Actors:
    """The running actors, as the driver sees them."""

    def __init__(self, ray: Any, handles: list[Any], progress: JobProgress) -> None:
        self._ray = ray
        self._handles = handles
        self._progress = progress
        self._runs = {handle.run.remote(): number for number, handle in enumerate(handles)}
        self._news = {handle.take_events.remote(): number for number, handle in enumerate(handles)}
        self._errors: list[DraftcacheError] = []

    def watch(self, stop: StopRequest) -> None:
        """Return when one actor comes to the end, as it has then seen the whole store; raise where none is left."""
        steps = StopSteps(stop)
        while self._runs:
            self._take_news()
            ended, _ = self._ray.wait(list(self._runs), num_returns=len(self._runs), timeout=_POLL_S)
            successes = [self._succeeded(run, self._runs.pop(run)) for run in ended]
            if any(successes) and not stop.asked:
                self._take_news(timeout=_POLL_S)
                return
            self._progress.refresh()
            for step in steps.due():
                for number in self._runs.values():
                    self._tell(self._handles[number], step, stop)
        if not stop.asked:
            raise (
                self._errors[0]
                if self._errors
                else WorkerError(
                    "expected at least one Ray worker to finish, found none; what was committed stays: run the same "
                    "command again to go on"
                )
            )

    def _take_news(self, timeout: float = 0) -> None:
        waiting = list(self._news)
        ready = self._ray.wait(waiting, num_returns=len(waiting), timeout=timeout)[0] if waiting else []
        for reference in ready:
            number = self._news.pop(reference)
            try:
                events = self._ray.get(reference)
            except self._ray.exceptions.RayError:  # the result of `run` says why the actor died
                self._progress.drop(number)
                continue
            for event in events:
                self._progress.take(number, event)
            self._news[self._handles[number].take_events.remote()] = number

    def _succeeded(self, run: Any, number: int) -> bool:
        try:
            error = self._ray.get(run)
        except self._ray.exceptions.RayError as exc:
            self._progress.drop(number)
            self._progress.take(number, Line(f"worker {number} ended early: {exc}"))
            return False
        if error is None:
            return True
        self._errors.append(error)
        self._progress.take(number, Line(f"worker {number} ended early: {error}"))
        return False

    def _tell(self, handle: Any, step: str, stop: StopRequest) -> None:
        if step == "kill":
            self._ray.kill(handle)
        else:
            handle.ask_to_stop.remote(stop.grace_seconds if step == "ask" else 0.0)


def _with_absolute_paths(config: CaptureConfig) -> CaptureConfig:
    """The settings with absolute paths, since an actor has another working directory."""
    output = config.output if "://" in str(config.output) else Path(config.output).resolve()
    vocab_map = None if config.vocab_map is None else config.vocab_map.resolve()
    verifier, dataset = config.verifier.resolve(), config.dataset.resolve()
    more = tuple(path.resolve() for path in config.more_vocab_maps)
    return replace(config, verifier=verifier, dataset=dataset, vocab_map=vocab_map, more_vocab_maps=more, output=output)
