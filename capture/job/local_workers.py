"""Workers as processes of this machine, one per GPU. CUDA does not survive fork, so they are spawned."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.progress import Event, JobProgress, Line
from draftcache.capture.job.stopping import ParentSignals, StopSignals, StopSteps
from draftcache.store.common.errors import DraftcacheError, StoreError
from draftcache.store.common.stopping import Stopped, StopRequest

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

_POLL_S = 0.2
_GENTLE = signal.SIGUSR1  # SIGTERM reaches whole process groups: workers hear of it from the command alone
_SIGNALS = {"ask": _GENTLE, "hurry": signal.SIGINT, "kill": signal.SIGKILL}


def run_processes(config: CaptureConfig, workers: int, progress: JobProgress, stop: StopRequest) -> None:
    """Run `workers` processes until the store is whole.

    A worker that dies leaves its shard to the others. Raises what the first one raised where all have died, and
    Stopped after SIGTERM or SIGINT.
    """
    with ParentSignals(stop):
        processes = [_Worker(config, number, workers) for number in range(workers)]
        try:
            _watch(processes, progress, stop)
        finally:
            for worker in processes:
                worker.end()
    if stop.asked:
        raise Stopped(stop.signal_number)
    _require_success(processes)


def _watch(workers: list[_Worker], progress: JobProgress, stop: StopRequest) -> None:
    """Show what they report and pass on what they are told, until all have ended."""
    steps = StopSteps(stop)
    while running := [worker for worker in workers if not worker.ended]:
        ready = wait([worker.connection for worker in running], timeout=_POLL_S)
        for worker in running:
            if worker.connection in ready:
                worker.receive(progress, quietly=stop.asked)
        progress.refresh()
        for step in steps.due():
            for worker in running:
                worker.tell(_SIGNALS[step])


def _require_success(workers: list[_Worker]) -> None:
    """One that came to the end has seen the whole store; what the others died of is in the log."""
    if any(worker.process.exitcode == 0 for worker in workers):
        return
    for worker in workers:
        if worker.error is not None:
            raise worker.error
    codes = [worker.process.exitcode for worker in workers]
    raise StoreError(
        f"expected at least one worker to finish, found exit codes {codes} (-9: killed, perhaps for memory); what was "
        "committed stays: run the same command again to go on"
    )


class _Worker:
    """The command's end of one worker process."""

    def __init__(self, config: CaptureConfig, number: int, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.number = number
        self.ended = False
        self.error: DraftcacheError | None = None
        self.connection, theirs = context.Pipe(duplex=False)
        self.process: SpawnProcess = context.Process(target=worker_main, args=(config, number, count, theirs))
        self.process.start()
        theirs.close()

    def receive(self, progress: JobProgress, *, quietly: bool) -> None:
        """What has arrived; the end of the connection is the end of the process."""
        try:
            while self.connection.poll():
                message: Event | DraftcacheError = self.connection.recv()
                if isinstance(message, DraftcacheError):
                    self.error = message
                else:
                    progress.take(self.number, message)
        except (EOFError, OSError):
            self.ended = True
            self.process.join()
            progress.drop(self.number)
            if self.process.exitcode and not quietly:
                why = f"exit code {self.process.exitcode}" if self.error is None else str(self.error)
                progress.take(self.number, Line(f"worker {self.number} ended early: {why}"))

    def tell(self, number: signal.Signals) -> None:
        """Send a signal."""
        if self.process.exitcode is None and self.process.pid is not None:
            os.kill(self.process.pid, number)

    def end(self) -> None:
        """Leave no process behind, whatever happened here."""
        self.connection.close()
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


def worker_main(config: CaptureConfig, number: int, count: int, connection: Connection) -> None:
    """A worker process: exit code 0 when the store is whole, 143 or 130 when it was stopped, else 1."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stop = StopRequest(config.grace_seconds)
    with StopSignals(stop, _GENTLE):
        threading.Thread(target=_leave_with_parent, daemon=True).start()
        try:
            _work(config, number, count, connection, stop)
        except Stopped as exc:
            sys.exit(exc.exit_code)
        except DraftcacheError as exc:
            with contextlib.suppress(OSError):
                connection.send(exc)
            sys.exit(1)


def _work(config: CaptureConfig, number: int, count: int, connection: Connection, stop: StopRequest) -> None:
    from transformers.utils import logging

    from draftcache.capture.job.shard_worker import WorkerRole
    from draftcache.capture.job.worker_job import CaptureJob

    logging.disable_progress_bar()  # one line for the job, not one per worker

    def report(event: Event) -> None:
        try:
            connection.send(event)
        except OSError:  # the command is gone
            raise Stopped(signal.SIGTERM) from None

    with CaptureJob(replace(config, device=_worker_device(config.device, number, config.shard))) as job:
        job.run_worker(WorkerRole(report=report, stop=stop, number=number, count=count))


def worker_count(device: str, shard: int) -> int:
    """One per `shard` visible GPUs, unless one device was named; one without GPUs."""
    import torch

    if device not in ("auto", "cuda"):
        return 1
    return max(1, torch.cuda.device_count() // shard)


def _worker_device(device: str, number: int, shard: int) -> str:
    """The (first) device of a worker process, dealt out in turn where all GPUs are meant."""
    import torch

    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{number % worker_count(device, shard) * shard}"


def _leave_with_parent() -> None:
    """A command that was killed can tell its workers nothing; they stop by themselves."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(StopSteps.LEAVING_S)
    os._exit(1)
