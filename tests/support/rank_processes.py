"""Ranks of a training run as real processes: starting them, awaiting them, the weights that they end with."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from draftcache.draft_train.config import TrainConfig
from support.forked import CLI, Executed, Forked, started

WORKER = str(Path(__file__).with_name("rank_worker.py"))
"""The script of one rank that also writes its weights; its first word is `as_json` of the settings."""
TRAIN = [*CLI, "train"]


def free_port() -> str:
    """Find a port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start(world: int, words: list[str], *of_each: list[str]) -> list[Forked | Executed]:
    """Start one process per rank, under the variables that torchrun sets. `of_each`: each rank's further words."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    return [
        started(
            [*words, *(of_each[rank] if of_each else [])],
            os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]


def finish(processes: Sequence[Forked | Executed]) -> list[tuple[int, str, str]]:
    """Wait for all processes, and give exit code, stdout and stderr of each."""
    return [process.ended(timeout=120) for process in processes]


def as_json(made: TrainConfig) -> str:
    """Write the settings as `rank_worker.py` takes them."""
    return json.dumps(dataclasses.asdict(made), default=str)


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file, by name."""
    return load_file(path)
