"""Data-parallel training: each of several processes (ranks) takes a part of every step, and gradients are summed.

torchrun starts them, as in `torchrun --nproc-per-node 8 $(which draftcache) train ...`, and sets RANK, WORLD_SIZE and
LOCAL_RANK, from which a process knows its rank. GPUs communicate over NCCL, CPUs over gloo. All ranks hold the same
weights bit for bit: they begin with rank 0's weights, and every rank makes the same optimizer step from the same sums.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from draftcache.store.common.device import choose_device, use_device
from draftcache.store.common.errors import (
    DraftcacheError,
    InputError,
    ManifestMismatchError,
    RankError,
    RankRefusedError,
)
from draftcache.store.common.files import canonical_json, hash_bytes

TIMEOUT = timedelta(minutes=30)
"""How long ranks wait for one another: longer than a checkpoint or another rank's part of an evaluation takes."""


class Ranks:
    """One process of a run, and its communication with the others. A single process communicates with nobody."""

    def __init__(self, device: torch.device, rank: int = 0, world: int = 1) -> None:
        """`device` is the device that this rank computes on."""
        self.device, self.rank, self.world = device, rank, world

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which alone writes files and decides where a run resumes."""
        return self.rank == 0

    def add_up(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values` over all ranks, in place, and return them."""
        if self.world > 1:
            with _answered():
                dist.all_reduce(values)
        return values

    def copy_from_leader(self, values: Iterable[torch.Tensor]) -> None:
        """Overwrite these tensors, which are on this rank's device, with rank 0's."""
        if self.world > 1:
            with _answered(), torch.no_grad():
                for value in values:
                    dist.broadcast(value, src=0)

    def meet(self) -> None:
        """Wait until all ranks have called this method."""
        self.add_up(torch.zeros(1, device=self.device)).tolist()

    def agree(self, problem: DraftcacheError | None) -> None:
        """End all ranks if one has a problem: that rank raises the problem, and the others raise RankRefusedError."""
        problems = self.add_up(torch.tensor([float(problem is not None)], device=self.device))
        if problem is not None:
            raise problem
        if problems.item():
            raise RankRefusedError(f"rank {self.rank}: another rank refused the run; its own message says why")

    def require_same(self, values: Mapping[str, Any]) -> None:
        """Raise ManifestMismatchError, naming the first of these JSON values that differs between ranks."""
        if self.world == 1:
            return
        found = [int(hash_bytes(canonical_json(value).encode())[:15], 16) for value in values.values()]  # 60 bits
        low, high = (torch.tensor(found, dtype=torch.int64, device=self.device) for _ in range(2))
        with _answered():
            dist.all_reduce(low, dist.ReduceOp.MIN)
            dist.all_reduce(high, dist.ReduceOp.MAX)
        for name, same in zip(values, (low == high).tolist(), strict=True):
            if not same:
                raise ManifestMismatchError(
                    f"rank {self.rank}: expected the same {name} on all ranks, found {values[name]!r} here and another "
                    "elsewhere; start every rank with the same command on the same store"
                )


@contextmanager
def joined_ranks(device_name: str) -> Iterator[Ranks]:
    """Connect this process to the other ranks that torchrun's variables announce. Without them it is the only rank.

    Raises InputError where variables are missing or a rank can't have a GPU for itself, and RankError where a rank does
    not answer.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Ranks(use_device(device_name))
        return
    device = choose_device(device_name)
    rank, local = (int(os.environ.get(name, "-1")) for name in ("RANK", "LOCAL_RANK"))
    if rank < 0 or local < 0:
        raise InputError("expected RANK and LOCAL_RANK beside WORLD_SIZE, found none; start the ranks with torchrun")
    if device.type == "cuda":
        device = _own_gpu(device, local)
    with _answered():
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            timeout=TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )
    yield Ranks(device, rank, world)
    # This is skipped after an error, because it would wait for ranks that may be gone. The end of the process closes
    # the connections.
    dist.destroy_process_group()


def _own_gpu(device: torch.device, local: int) -> torch.device:
    if device.index is not None:
        raise InputError(f"--device: expected cuda, cpu or auto with several ranks, found {device}: each takes its own")
    if local >= (found := torch.cuda.device_count()):
        raise InputError(f"expected a GPU for each rank of this node, found {found}; lower torchrun's --nproc-per-node")
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


@contextmanager
def _answered() -> Iterator[None]:
    """Turn an error of torch.distributed into a RankError."""
    try:
        yield
    except RuntimeError as exc:
        raise RankError(
            "expected an answer from every rank, found one gone or late; see what the other ranks say, then run the "
            f"same command again to resume ({str(exc).splitlines()[0]})"
        ) from exc


class GradientSums:
    """Sums gradients over ranks, each as soon as it is complete, while the backward pass computes the others.

    All ranks must start their collectives in one order, but ranks may complete their gradients in different orders. A
    gradient therefore waits for the gradients before it in a fixed order, which is nearly the order in which autograd
    completes them. Every parameter has a collective for itself, so that the rounding of its sum does not depend on
    which other gradients were complete.
    """

    def __init__(self, model: nn.Module, ranks: Ranks) -> None:
        parameters = list(model.parameters())
        last_first = [item for item in reversed(parameters) if item.ndim == 2]
        self._order = last_first + [item for item in parameters if item.ndim != 2]
        self._ranks = ranks
        self._complete: set[nn.Parameter] = set()
        self._begun: list[Any] = []

    def ready(self, parameters: list[nn.Parameter]) -> None:
        """Take parameters whose float32 gradients are complete, and start the sums that are next in order."""
        self._complete.update(parameters)
        while len(self._begun) < len(self._order) and self._order[len(self._begun)] in self._complete:
            self._begin(self._order[len(self._begun)])

    def _begin(self, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None, "a gradient pass leaves none out"
        with _answered():
            self._begun.append(dist.all_reduce(parameter.grad, async_op=True))

    def finish(self) -> None:
        """Wait for all sums. A parameter that has no gradient on this rank counts as zeros here."""
        if self._ranks.world == 1:
            return
        for parameter in self._order[len(self._begun) :]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            self._begin(parameter)
        with _answered():
            for work in self._begun:
                work.wait()
        self._complete.clear()
        self._begun.clear()
