"""Runs a sweep's groups as processes of this machine: one per GPU, or a few on the CPU."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from draftcache.store.common.child_processes import end_with_parent
from draftcache.store.common.device import choose_device
from draftcache.store.common.errors import WorkerError
from draftcache.store.common.stopping import Stopped, StopRequest, asked_by_signals
from draftcache.tools.sweep.plan import Sweep
from draftcache.tools.sweep.progress import SweepProgress

_POLL_S = 0.5


@dataclass(frozen=True)
class Slot:
    """What one worker process may use."""

    devices: tuple[str, ...]
    """Names of devices as the worker sees them."""
    environment: dict[str, str]


def slots_of(groups: int, device: str, workers: int) -> list[Slot]:
    """Return the slots of this machine for `groups` groups, of which `workers` (0: as many as serve) may run at once.

    With more GPUs than groups, a group gets several GPUs and still reads the store once. Only where `workers` asks for
    it do several share a GPU. On the CPU every worker has its share of the cores.
    """
    chosen = choose_device(device)
    if chosen.type == "cuda":
        gpus = _gpus() if chosen.index is None else [str(chosen.index)]
        count = min(workers or len(gpus), groups)
        shares = [gpus[number::count] or [gpus[number % len(gpus)]] for number in range(count)]
        return [
            Slot(tuple(f"cuda:{at}" for at in range(len(share))), {"CUDA_VISIBLE_DEVICES": ",".join(share)})
            for share in shares
        ]
    cores = len(os.sched_getaffinity(0))
    count = min(workers or cores, groups)
    return [Slot(("cpu",), {"OMP_NUM_THREADS": str(max(1, cores // count))}) for _ in range(count)]


def _gpus() -> list[str]:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]


def run_locally(sweep: Sweep, output: Path, slots: Sequence[Slot], side_by_side: int) -> None:
    """Run every group of the sweep in worker processes, as many at once as there are slots.

    Raises Stopped after SIGTERM or SIGINT, when all workers have saved their trials, and WorkerError where workers
    failed, after all groups have had their turn.
    """
    with asked_by_signals(StopRequest()) as stop, SweepProgress(sweep, output) as progress:
        workers = _Workers(output, list(slots), side_by_side)
        try:
            for group in range(len(sweep.groups)):
                while not stop.asked and not workers.start(group):
                    workers.watch(progress)
            while workers.running and not stop.asked:
                workers.watch(progress)
            if stop.asked:
                workers.stop(progress)
                raise Stopped(stop.signal_number)
        finally:
            workers.kill()
    if workers.failed:
        raise WorkerError(
            f"expected every group of trials to be trained, found exit codes {workers.failed} by group (-9: killed, "
            "perhaps for memory); what was saved stays: run the same command again to go on"
        )


class _Workers:
    """The worker processes that run, and the slots that are free."""

    def __init__(self, output: Path, free: list[Slot], side_by_side: int) -> None:
        self._output, self._free, self._side_by_side = output, free, side_by_side
        self.running: dict[int, tuple[Slot, subprocess.Popen[bytes]]] = {}
        """By group."""
        self.failed: dict[int, int] = {}
        """Exit codes by group, of workers that failed."""

    def start(self, group: int) -> bool:
        """Start a worker for a group in a free slot; return False where there is none."""
        if not self._free:
            return False
        slot = self._free.pop(0)
        words = [sys.executable, "-m", "draftcache.tools.sweep.worker", str(self._output), str(group)]
        words += [",".join(slot.devices), str(self._side_by_side)]
        process = subprocess.Popen(
            words,
            env=os.environ | slot.environment,
            stdout=2,  # this command's stdout is for its result
            start_new_session=True,  # Ctrl-C reaches workers through this process alone
            preexec_fn=end_with_parent(signal.SIGKILL),  # what is saved is whole, and the next try finds no lock
        )
        self.running[group] = (slot, process)
        return True

    def watch(self, progress: SweepProgress) -> None:
        """Wait a moment, show the progress, and take back the slots of workers that have ended."""
        time.sleep(_POLL_S)
        progress.refresh()
        for group, (slot, process) in list(self.running.items()):
            if (code := process.poll()) is not None:
                del self.running[group]
                self._free.append(slot)
                if code:
                    self.failed[group] = code

    def stop(self, progress: SweepProgress) -> None:
        """Ask all workers to save their trials, and wait for them."""
        for _, process in self.running.values():
            process.send_signal(signal.SIGTERM)
        while self.running:
            self.watch(progress)

    def kill(self) -> None:
        """End what still runs at once."""
        for _, process in self.running.values():
            process.kill()
            process.wait()
