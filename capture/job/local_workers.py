"""Workers as processes of this machine, one per GPU. They are spawned, since CUDA does not survive a fork."""

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
from draftcache.store.common.errors import DraftcacheError, WorkerError
from draftcache.store.common.failures import describe_failure
from draftcache.store.common.log_times import time_worker_lines
from draftcache.store.common.stopping import Stopped, StopRequest, signals_held_back

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

_POLL_S = 0.2
_GENTLE = signal.SIGUSR1  # SIGTERM reaches whole process groups, so workers ignore it and the command sends this one
_SIGNALS = {"ask": _GENTLE, "hurry": signal.SIGINT, "kill": signal.SIGKILL}


def run_processes(config: CaptureConfig, workers: int, progress: JobProgress, stop: StopRequest) -> None:
    """Run `workers` processes until the store is whole.

    A worker that dies leaves its shard to the others. Raises Stopped after SIGTERM or SIGINT; where all workers have
    died, it raises the first worker's DraftcacheError, or WorkerError where no worker reported any.
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
    """Show the workers' reports and pass on the steps of a stop, until all workers have ended."""
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
    """Raise the first worker's error unless any worker came to the end, as that one has seen the whole store.

    The log says what the others died of.
    """
    if any(worker.process.exitcode == 0 for worker in workers):
        return
    for worker in workers:
        if worker.error is not None:
            raise worker.error
    codes = [worker.process.exitcode for worker in workers]
    raise WorkerError(
        f"expected at least one worker to finish, found exit codes {codes} (-9: killed, perhaps for memory); what was "
        "committed stays: run the same command again to go on"
    )


class _Worker:
    """One worker process, as the command sees it."""

    def __init__(self, config: CaptureConfig, number: int, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.number = number
        self.ended = False
        self.error: DraftcacheError | None = None
        self.connection, theirs = context.Pipe(duplex=False)
        self.process: SpawnProcess = context.Process(target=worker_main, args=(config, number, count, theirs))
        with signals_held_back():
            self.process.start()
        theirs.close()

    def receive(self, progress: JobProgress, *, quietly: bool) -> None:
        """Handle the messages that have arrived; a closed connection means that the process has ended."""
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
        """Kill the process if it still runs, and wait for its end."""
        self.connection.close()
        if self.process.is_alive():
            self.process.kill()
        self.process.join()


def worker_main(config: CaptureConfig, number: int, count: int, connection: Connection) -> None:
    """Main function of a worker process. Exit code 0: the store is whole; 143 or 130: stopped; 2 or 3: an error."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time_worker_lines()
    stop = StopRequest(config.grace_seconds)
    with StopSignals(stop, _GENTLE):
        threading.Thread(target=_leave_with_parent, daemon=True).start()
        try:
            _work(config, number, count, connection, stop)
        except Stopped as exc:
            sys.exit(exc.exit_code)
        except Exception as exc:
            error = exc if isinstance(exc, DraftcacheError) else WorkerError(describe_failure(exc))
            with contextlib.suppress(OSError):
                connection.send(error)
            sys.exit(error.exit_code)


def _work(config: CaptureConfig, number: int, count: int, connection: Connection, stop: StopRequest) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))  # blocked as the process started

    from transformers.utils import logging

    from draftcache.capture.job.shard_worker import WorkerRole
    from draftcache.capture.job.worker_job import CaptureJob

    logging.disable_progress_bar()  # the command shows one line for all workers

    def report(event: Event) -> None:
        try:
            connection.send(event)
        except OSError:  # the command has ended
            raise Stopped(signal.SIGTERM) from None

    with CaptureJob(replace(config, device=_worker_device(config.device, number, config.tensor_parallel))) as job:
        job.run_worker(WorkerRole(report=report, stop=stop, number=number, count=count))


def worker_count(device: str, tensor_parallel: int) -> int:
    """One worker per `tensor_parallel` visible GPUs; one where a device was named or there are no GPUs."""
    import torch

    if device not in ("auto", "cuda"):
        return 1
    return max(1, torch.cuda.device_count() // tensor_parallel)


def _worker_device(device: str, number: int, tensor_parallel: int) -> str:
    """The first device of worker `number`: where no device was named, the GPUs are dealt out in turn."""
    import torch

    if device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{number % worker_count(device, tensor_parallel) * tensor_parallel}"


def _leave_with_parent() -> None:
    """Stop this worker when the command has died, which can't tell its workers so if it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(StopSteps.LEAVING_S)
    os._exit(1)
