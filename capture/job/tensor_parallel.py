"""One verifier over several GPUs of a node, by transformers' own tensor-parallel plan for its class.

The worker's process is rank 0 and does all that a worker does. Rank 1 and up are followers: they hold their part of
the weights and repeat every forward that the worker begins, told by a pipe what to read, so that the collectives
inside the forward meet. Taps and final states are whole on every rank; rank 0's are the ones that are stored.
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
from draftcache.capture.job.work_plan import WorkPlan
from draftcache.capture.verifier.forward import Forward, Piece
from draftcache.capture.verifier.load import Verifier, choose_dtype, load_verifier
from draftcache.capture.verifier.self_check import check_verifier
from draftcache.capture.verifier.ssm_precision import enforce_contract
from draftcache.store.common.device import choose_device
from draftcache.store.common.errors import DraftcacheError, InputError, StoreError

if TYPE_CHECKING:
    from multiprocessing.context import SpawnProcess

_LOADING = timedelta(hours=2)
"""How long ranks may wait for one another: they load 60 GB and more at different speeds."""
_LAST_WORDS_S = 5.0


class ShardedVerifier:
    """The followers of a worker, from its end. `join` before the verifier is loaded, `lead` once it is."""

    def __init__(self, config: CaptureConfig) -> None:
        """Start them. Raises InputError where there are not enough GPUs."""
        self._size = config.shard
        self._first = first_gpu(config)
        self._meeting = tempfile.TemporaryDirectory(prefix="draftcache-shard-")
        self._closing = False
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        self._processes: list[SpawnProcess] = []
        for rank in range(1, self._size):
            ours, theirs = context.Pipe()
            arguments = (config, rank, self._first, self._meeting.name, theirs)
            # A daemon: whatever ends this process in an orderly way ends it too; see also `_leave_with_leader`.
            process = context.Process(target=_follow, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        threading.Thread(target=self._watch, daemon=True).start()

    def join(self) -> None:
        """Meet the followers. For the worker, before it loads the verifier."""
        _join(0, self._size, self._first, self._meeting.name)

    def lead(self, verifier: Verifier) -> Verifier:
        """The same verifier; from now on the followers repeat each of its forwards."""
        return replace(verifier, engine=_LeadingForward(verifier.engine, self))

    def tell(self, token_ids: Tensor, layers: tuple[int, ...], chunk_tokens: int) -> None:
        """Let the followers begin the same forward."""
        for connection in self._connections:
            connection.send((token_ids.cpu().numpy(), layers, chunk_tokens))

    @contextlib.contextmanager
    def all_alive(self) -> Iterator[None]:
        """Around collectives: raises StoreError where they fail because a follower has died."""
        try:
            yield
        except (RuntimeError, OSError) as exc:
            if wait([process.sentinel for process in self._processes], timeout=_LAST_WORDS_S):
                raise StoreError(self._obituary()) from exc
            raise

    def _obituary(self) -> str:
        return (
            f"expected {self._size - 1} followers of this worker to hold their parts of the verifier, found exit codes "
            f"{[process.exitcode for process in self._processes]} (-9: killed, perhaps for memory); what was committed "
            "stays: run the same command again to go on"
        )

    def _watch(self) -> None:
        """A collective waits for a dead rank for hours, out of reach of every signal: leave for it."""
        wait([process.sentinel for process in self._processes])
        if self._closing:
            return
        time.sleep(_LAST_WORDS_S)  # the worker may be saying better why it ends
        if self._closing:
            return
        print(f"draftcache capture: error: {self._obituary()}", file=sys.stderr, flush=True)
        os._exit(1)

    def close(self) -> None:
        """End the followers."""
        self._closing = True
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()  # they may wait in a collective; they hold nothing that is worth an orderly end
            process.join()
        if dist.is_initialized():
            dist.destroy_process_group()
        self._meeting.cleanup()


class _LeadingForward:
    """A forward that tells the followers first; `draftcache.capture.verifier.forward.Forward`."""

    def __init__(self, inner: Forward, group: ShardedVerifier) -> None:
        self.name = inner.name
        self._inner = inner
        self._group = group

    def implementations(self) -> dict[str, str]:
        """See Forward."""
        return self._inner.implementations()

    def prefill(self, token_ids: Tensor, layers: tuple[int, ...], chunk_tokens: int) -> Iterator[Piece]:
        """See Forward. Every piece has to be taken: the followers compute them all."""
        with self._group.all_alive():
            self._group.tell(token_ids, layers, chunk_tokens)
            yield from self._inner.prefill(token_ids, layers, chunk_tokens)


def first_gpu(config: CaptureConfig) -> int:
    """Number of the worker's first GPU; its verifier lies on `config.shard` of them from there on.

    Raises InputError where this machine has fewer.
    """
    device = choose_device(config.device)
    if device.type != "cuda":
        if torch.cuda.is_available():
            raise InputError(
                f"--device {config.device}: expected GPUs for --shard {config.shard} on a machine that has some; hide "
                "them with CUDA_VISIBLE_DEVICES= to run on its CPU"
            )
        return 0
    first, count = device.index or 0, torch.cuda.device_count()
    if first + config.shard > count:
        raise InputError(f"--shard {config.shard}: expected {config.shard} GPUs from {device} on, found {count} in all")
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
    """A follower's process: until the worker closes the pipe, or is gone."""
    for number in (signal.SIGTERM, signal.SIGINT):  # they reach whole process groups: the worker decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_leave_with_leader, daemon=True).start()
    from transformers.utils import logging

    logging.disable_progress_bar()
    with contextlib.suppress(EOFError):
        try:
            _join(rank, config.shard, first, meeting)
            device = choose_device(config.device)
            verifier = load_verifier(
                config.verifier,
                device=torch.device("cuda", first + rank) if device.type == "cuda" else device,
                dtype=choose_dtype(config.compute_dtype, device),
                trust_remote_code=config.trust_remote_code,
                shard=config.shard,
            )
            enforce_contract(verifier.model, config.verifier, allow_fallback=config.allow_fallback)
            check_verifier(verifier, config, WorkPlan.of(config))
        except DraftcacheError:
            sys.exit(1)  # the worker meets the same, and says so
        while True:
            token_ids, layers, chunk_tokens = connection.recv()
            for _ in verifier.prefill(torch.from_numpy(token_ids), layers, chunk_tokens):
                pass


def _leave_with_leader() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
