"""One verifier over several GPUs of a node, by transformers' own tensor-parallel plan for its class.

The worker's process is rank 0 and does all that any worker does. The ranks from 1 on are followers: each holds its part
of the weights and repeats every forward that the worker begins, so that the collectives inside of the forward meet. The
worker sends the forward's arguments through a pipe. Taps and final states are complete on every rank; rank 0 stores its
own.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.start_check import check_verifier
from draftcache.capture.job.work_plan import WorkPlan
from draftcache.capture.verifier.forward import Forward, Piece
from draftcache.capture.verifier.load import Verifier, choose_dtype, load_verifier
from draftcache.capture.verifier.ssm_precision import enforce_contract
from draftcache.store.common.device import choose_device
from draftcache.store.common.errors import DraftcacheError, InputError, WorkerError
from draftcache.store.common.log_times import time_worker_lines
from draftcache.store.common.stopping import signals_held_back

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

_LOADING = timedelta(hours=2)
"""How long ranks may wait for one another: they load 60 GB and more at different speeds."""
_LAST_WORDS_S = 5.0
"""Seconds that the worker gets to report its own error before its followers' exit codes are reported."""


class TensorParallelGroup:
    """The followers of a worker, as the worker sees them: `join` before the verifier is loaded, `lead` afterwards."""

    def __init__(self, config: CaptureConfig) -> None:
        """Start the followers. Raises InputError where there are not enough GPUs."""
        self._size = config.tensor_parallel
        self._first = first_gpu(config)
        self._meeting = tempfile.TemporaryDirectory(prefix="draftcache-tensor-parallel-")
        self._closing = False
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes: list[SpawnProcess] = []
        for rank in range(1, self._size):
            ours, theirs = context.Pipe()
            arguments = (config, rank, self._first, self._meeting.name, theirs)
            # A daemon process is ended when this process exits normally; `_leave_with_leader` covers all other ends.
            process = context.Process(target=_follow, args=arguments, daemon=True)
            with signals_held_back():
                process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        threading.Thread(target=self._watch, daemon=True).start()

    def join(self) -> None:
        """Form the process group with the followers, before the worker loads the verifier."""
        _join(0, self._size, self._first, self._meeting.name)

    def lead(self, verifier: Verifier) -> Verifier:
        """The verifier with a forward that the followers repeat, whenever it runs."""
        return replace(verifier, body_forward=_LeadingForward(verifier.body_forward, self))

    def tell(self, token_ids: Tensor, layers: tuple[int, ...], chunk_tokens: int) -> None:
        """Send the arguments of a forward to the followers, which begin it at once."""
        for connection in self._connections:
            connection.send((token_ids.cpu().numpy(), layers, chunk_tokens))

    @contextlib.contextmanager
    def all_alive(self) -> Iterator[None]:
        """Surround collectives with this: raises WorkerError where they fail because a follower has died."""
        try:
            yield
        except (RuntimeError, OSError) as exc:
            if wait([process.sentinel for process in self._processes], timeout=_LAST_WORDS_S):
                raise WorkerError(self._exit_report()) from exc
            raise

    def _exit_report(self) -> str:
        for process in self._processes:
            if wait([process.sentinel], timeout=0):
                process.join()  # the sentinel closes a moment before the exit code is known
        return (
            f"expected {self._size - 1} followers of this worker to hold their parts of the verifier, found exit codes "
            f"{[process.exitcode for process in self._processes]} (-9: killed, perhaps for memory); what was committed "
            "stays: run the same command again to go on"
        )

    def _watch(self) -> None:
        """End this process when a follower dies: a collective waits for a dead rank for hours and ignores signals."""
        wait([process.sentinel for process in self._processes])
        if self._closing:
            return
        time.sleep(_LAST_WORDS_S)  # the worker may be about to report a better reason
        if self._closing:
            return
        print(f"draftcache capture: error: {self._exit_report()}", file=sys.stderr, flush=True)
        os._exit(WorkerError.exit_code)

    def close(self) -> None:
        """End the followers and the process group."""
        self._closing = True
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()  # it may wait in a collective, and holds nothing that needs an orderly end
            process.join()
        if dist.is_initialized():
            dist.destroy_process_group()
        self._meeting.cleanup()


class _LeadingForward:
    """Lets the followers begin every forward before `inner` runs it. Implements `verifier.forward.Forward`."""

    def __init__(self, inner: Forward, group: TensorParallelGroup) -> None:
        self.name = inner.name
        self._inner = inner
        self._group = group

    @property
    def chunk_multiple(self) -> int:
        return self._inner.chunk_multiple

    def implementations(self) -> dict[str, str]:
        return self._inner.implementations()

    def block_differences(self, token_ids: Tensor) -> list[float]:
        """Raises RuntimeError: all ranks compare their blocks by themselves before rank 0 leads the others."""
        raise RuntimeError("expected block_differences before TensorParallelGroup.lead, found a call after it")

    def prefill(self, token_ids: Tensor, layers: tuple[int, ...], chunk_tokens: int) -> Iterator[Piece]:
        """The caller has to take every piece, as the followers compute all of them."""
        with self._group.all_alive():
            self._group.tell(token_ids, layers, chunk_tokens)
            yield from self._inner.prefill(token_ids, layers, chunk_tokens)


def first_gpu(config: CaptureConfig) -> int:
    """Number of the worker's first GPU, from which on its verifier lies on `config.tensor_parallel` GPUs; 0 on a CPU.

    Raises InputError where this machine has fewer GPUs.
    """
    device = choose_device(config.device)
    if device.type != "cuda":
        if torch.cuda.is_available():
            raise InputError(
                f"--device {config.device}: expected GPUs for --tensor-parallel {config.tensor_parallel} on a machine "
                "that has some; hide them with CUDA_VISIBLE_DEVICES= to run on its CPU"
            )
        return 0
    first, count = device.index or 0, torch.cuda.device_count()
    if first + config.tensor_parallel > count:
        raise InputError(
            f"--tensor-parallel {config.tensor_parallel}: expected {config.tensor_parallel} GPUs from {device} on, "
            f"found {count} in all"
        )
    return first


def _join(rank: int, size: int, first: int, meeting: str) -> None:
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", first + rank) if on_gpu else None
    if device is not None:
        torch.cuda.set_device(device)
    os.environ["LOCAL_RANK"] = str(first + rank)  # transformers binds the process to the GPU of this number
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.FileStore(f"{meeting}/meeting", size),  # type: ignore[attr-defined]  # public, but not re-exported
        rank=rank,
        world_size=size,
        timeout=_LOADING,
        device_id=device,
    )


def _follow(config: CaptureConfig, rank: int, first: int, meeting: str, connection: Connection) -> None:
    """Main function of a follower's process, which ends when the worker closes the pipe or has died."""
    for number in (signal.SIGTERM, signal.SIGINT):  # they reach whole process groups, and the worker decides
        signal.signal(number, signal.SIG_IGN)
    time_worker_lines()
    threading.Thread(target=_leave_with_leader, daemon=True).start()
    from transformers.utils import logging

    logging.disable_progress_bar()
    with contextlib.suppress(EOFError):
        try:
            _join(rank, config.tensor_parallel, first, meeting)
            device = torch.device("cuda", first + rank) if torch.cuda.is_available() else torch.device("cpu")
            verifier = load_verifier(
                config.verifier,
                device=device,
                dtype=choose_dtype(config.compute_dtype, device),
                trust_remote_code=config.trust_remote_code,
                tensor_parallel=config.tensor_parallel,
                max_model_len=config.max_model_len,
            )
            enforce_contract(verifier.model, config.verifier, allow_fallback=config.allow_fallback)
            verifier, _ = check_verifier(verifier, config, WorkPlan.of(config))
        except DraftcacheError:
            sys.exit(1)  # the worker raises the same error and reports it
        while True:
            token_ids, layers, chunk_tokens = connection.recv()
            for _ in verifier.prefill(torch.from_numpy(token_ids), layers, chunk_tokens):
                pass


def _leave_with_leader() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
