"""Ctrl-C in training: the first saves the step that is running, as SIGTERM does, and the second interrupts at once."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from draftcache.draft_train.checkpoint import checkpoints, load_state, resolve_checkpoint
from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.trainer import Trainer
from draftcache.store.writer import StoreWriter
from support.log_lines import without_times
from support.processes import wait_for
from support.rank_processes import TRAIN, finish, start
from support.synthetic import conversation, manifest, turns, write_files, write_store
from support.training_runs import config, flags, metrics


@pytest.fixture(autouse=True)
def _ctrl_c_is_not_ignored() -> Iterator[None]:
    """Processes inherit an ignored SIGINT, as that of a shell's job in the background."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def command(settings: TrainConfig, *more: str) -> list[str]:
    return [sys.executable, *TRAIN, *flags(settings), *more]


def has_logged(settings: TrainConfig) -> bool:
    log = settings.output / "metrics.jsonl"
    return log.is_file() and bool(log.read_text())


def read_until(stream: IO[str], text: str) -> str:
    lines = ""
    while text not in lines:
        line = stream.readline()
        assert line, lines
        lines += line
    return lines


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM])
def test_a_signal_saves_the_step_and_the_same_command_resumes(tmp_path: Path, number: signal.Signals) -> None:
    write_store(tmp_path / "store", per_shard=6)
    whole, cut = (config(tmp_path, output=tmp_path / n, epochs=100, checkpoint_every=1000) for n in ("whole", "cut"))
    Trainer(whole).run()
    with subprocess.Popen(command(cut), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: has_logged(cut))
        process.send_signal(number)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    state = load_state(resolve_checkpoint(cut.output))
    assert not state.finished
    assert f"stopped after step {state.step}, which is saved: run the same command again" in errors
    assert ("press Ctrl-C again to stop at once" in errors) == (number == signal.SIGINT)
    assert "draftcache train: stopped" in without_times(errors)  # what the signal's handler writes has a time too
    subprocess.run(command(cut), check=True, capture_output=True)
    mine, theirs = (load_file(checkpoints(run.output)[-1] / "model.safetensors") for run in (cut, whole))
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert [row["loss"] for row in metrics(cut.output)] == [row["loss"] for row in metrics(whole.output)]


def test_ctrl_c_of_all_ranks_saves(tmp_path: Path) -> None:
    write_store(tmp_path / "store", per_shard=6)
    settings = config(tmp_path, epochs=3000, checkpoint_every=100_000)
    processes = start(2, [*TRAIN, *flags(settings)])
    wait_for(lambda: has_logged(settings))
    for process in processes:
        process.send_signal(signal.SIGINT)
    ends = finish(processes)
    assert [code for code, *_ in ends] == [130, 130], ends
    assert not load_state(resolve_checkpoint(settings.output)).finished


def long_step(root: Path) -> TrainConfig:
    """Settings of a run whose first step takes many seconds: a slice of the loss for every row."""
    rng = np.random.default_rng(0)
    with StoreWriter(root / "store", manifest(shards=1, shard_tokens=10_000), write_files) as writer:
        items = [conversation(rng, turns(6000, (6, 5990)), number=number) for number in range(2)]
        writer.write_shard(0, items, {"quarantined": [], "gates": {}})
        writer.finish()
    return config(root, epochs=1, batch_conversations=2)


def test_a_second_ctrl_c_interrupts_at_once(tmp_path: Path) -> None:
    settings = long_step(tmp_path)
    words = command(settings, "--loss-chunk", "1")
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        wait_for((settings.output / "metrics.jsonl").is_file)
        process.send_signal(signal.SIGINT)
        read_until(process.stderr, "press Ctrl-C again to stop at once")
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    assert "interrupted; the same command goes on from what was saved" in errors
    assert "Traceback" not in errors
    assert not checkpoints(settings.output)
    assert not has_logged(settings)


def test_an_ignored_ctrl_c_stays_ignored(tmp_path: Path) -> None:
    """A shell starts its jobs in the background so, and Ctrl-C is then meant for another."""
    write_store(tmp_path / "store", per_shard=6)
    settings = config(tmp_path, epochs=100)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with subprocess.Popen(command(settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for(lambda: has_logged(settings))
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=90)
    assert process.returncode == 0
    assert load_state(resolve_checkpoint(settings.output)).finished
