"""A run's directory under real kills and real rivals: no half checkpoint, and no two runs at once."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from draftcache.draft_train.checkpoint import checkpoint_path, checkpoints, load_state
from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.output_lock import LOCK_NAME, OutputLock, output_lock
from draftcache.draft_train.ranks import Ranks
from draftcache.draft_train.run_log import RunLog
from draftcache.draft_train.trainer import Trainer, TrainingStopped
from draftcache.store.common.device import choose_device
from draftcache.store.common.errors import InputError
from support.processes import wait_for
from support.rank_processes import TRAIN, finish, start
from support.synthetic import write_store
from support.training_runs import config, flags, metrics

MANY = 20_000
"""Files in a checkpoint, so that deleting it takes a while: some tenths of a second."""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "store", per_shard=6)
    return tmp_path


def started(settings: TrainConfig, *more: str) -> subprocess.Popen[str]:
    words = [sys.executable, "-m", "draftcache.tools.cli", "train", *flags(settings), *more]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_kill_while_old_checkpoints_are_deleted_leaves_no_half_of_one(store: Path) -> None:
    Trainer(config(store, epochs=1)).run()
    first = checkpoint_path(store / "run", 3)
    assert first.is_dir()
    for number in range(MANY):
        (first / f"more{number}").touch()
    whole = len(list(first.iterdir()))

    def deleting() -> bool:
        try:
            return len(os.listdir(first)) < whole  # noqa: PTH208  # the quickest way to look
        except FileNotFoundError:  # it has another name by now
            return True

    command = "import sys; from pathlib import Path; from draftcache.draft_train.checkpoint import checkpoints, "
    command += "prune_checkpoints; (p := Path(sys.argv[1])); prune_checkpoints(p, 1)"
    last = checkpoint_path(store / "run", 6)
    last.mkdir()
    with subprocess.Popen([sys.executable, "-c", command, str(store / "run")]) as process:
        wait_for(deleting)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "the kill came too late: raise MANY"
    last.rmdir()
    left = [path for path in first.parent.iterdir() if path.name.startswith(".")]
    assert len(left) == 1
    assert len(list(left[0].iterdir())) > 0
    assert all(len(list(path.iterdir())) == whole for path in checkpoints(store / "run"))
    Trainer(config(store, epochs=1)).run()
    assert [path.name for path in first.parent.iterdir()] == ["step_00000003"]


def test_a_second_run_in_one_directory_is_refused_while_the_first_lives(store: Path) -> None:
    settings = config(store, epochs=3000)
    with started(settings) as first:
        wait_for(lambda: checkpoints(settings.output))
        with started(settings) as second:
            errors = second.communicate(timeout=90)[1]
        assert second.returncode == 2
        assert f"{settings.output}: expected no other run at work there, found process {first.pid} of " in errors
        assert "choose another --output" in errors
        assert "Traceback" not in errors
        with pytest.raises(InputError, match="expected no other run"):
            Trainer(settings).run()
        first.kill()
    steps = [row["step"] for row in metrics(settings.output)[:-1]]
    assert steps == list(range(1, len(steps) + 1))
    assert load_state(checkpoints(settings.output)[-1]).step > 0
    with output_lock(settings.output, Ranks(choose_device("cpu"))):  # the kernel has released it
        pass


def test_where_locks_do_not_lock_the_run_that_began_last_goes_on_alone(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainer(config(store, output=store / "whole")).run()
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    settings = config(store)
    first = Trainer(settings)
    steps_of_first = 4

    def rival(log: RunLog | None, record: dict[str, Any], *, last: bool) -> TrainingStopped | None:
        if first.step == steps_of_first:
            Trainer(settings).run()
        return finish_step(log, record, last=last)

    finish_step = first.finish_step
    monkeypatch.setattr(first, "finish_step", rival)
    with pytest.raises(InputError, match=r"found process \d+ of .*, which has begun since: this run stops"):
        first.run()
    assert metrics(settings.output)[-1]["step"] == first.total_steps > steps_of_first
    assert [row["loss"] for row in metrics(settings.output)] == [row["loss"] for row in metrics(store / "whole")]


def test_what_a_rival_took_away_is_told_as_that(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that begins removes what is half written, which may be this run's checkpoint."""
    trainer = Trainer(config(store, epochs=1))

    def taken(*_: object) -> None:
        OutputLock(trainer.config.output / LOCK_NAME)
        raise FileNotFoundError("half a checkpoint")

    monkeypatch.setattr(trainer, "_save", taken)
    with pytest.raises(InputError, match="which has begun since"):
        trainer.run()


@pytest.mark.slow
def test_ranks_are_refused_together(store: Path) -> None:
    settings = config(store, epochs=1)
    with output_lock(settings.output, Ranks(choose_device("cpu"))):
        ends = finish(start(2, [*TRAIN, *flags(settings)]))
    assert [code for code, *_ in ends] == [2, 2], ends
    assert "expected no other run at work there" in ends[0][2]
    assert "rank 1: another rank refused the run" in ends[1][2]
    assert [code for code, *_ in finish(start(2, [*TRAIN, *flags(settings)]))] == [0, 0]
