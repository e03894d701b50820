"""What a run leaves for those who look at it later: run.json, Weights & Biases and TensorBoard, by real files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from draftcache.draft_train import tracking
from draftcache.draft_train.run_log import RUN_NAME
from draftcache.draft_train.tracking import scalars
from draftcache.draft_train.trainer import Trainer, TrainingStopped
from draftcache.store.common.errors import InputError
from draftcache.store.reader import StoreReader
from support.synthetic import write_store
from support.training_runs import config, flags, metrics


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "store")
    return tmp_path


def train(store: Path, *more: str) -> None:
    command = [sys.executable, "-m", "draftcache.tools.cli", "train", *flags(config(store, epochs=1)), *more]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"WANDB_SILENT": "true"})


def test_run_json_says_what_made_the_run_and_keeps_its_id(store: Path) -> None:
    Trainer(config(store, epochs=1)).run()
    first = json.loads((store / "run" / RUN_NAME).read_text())
    reader = StoreReader(store / "store")
    assert first["store"] == {"location": str(store / "store"), "hash": reader.manifest.hash}
    assert first["draft_vocab_hash"] == reader.vocab_map().hash
    assert first["verifier"] == reader.manifest.verifier
    assert first["settings"]["learning_rate"] == 1e-2
    assert first["settings"]["output"] == str(store / "run")
    assert len(first["commands"]) == 1
    stopped = Trainer(config(store, output=store / "again", epochs=2))
    stopped.stop.ask()
    with pytest.raises(TrainingStopped):
        stopped.run()
    before = json.loads((store / "again" / RUN_NAME).read_text())
    Trainer(config(store, output=store / "again", epochs=2)).run()
    after = json.loads((store / "again" / RUN_NAME).read_text())
    assert after["id"] == before["id"] != first["id"]
    assert len(after["commands"]) == 2


def test_records_become_scalars_by_step() -> None:
    assert scalars({"loss": 1.5, "step_accuracy": [0.5, 0.25]}) == {
        "loss": 1.5,
        "step_accuracy/0": 0.5,
        "step_accuracy/1": 0.25,
    }


@pytest.mark.slow
def test_wandb_offline_writes_a_run(store: Path) -> None:
    pytest.importorskip("wandb")
    train(store, "--track", "wandb-offline", "--track-group", "some")
    assert list((store / "run" / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.filterwarnings("ignore")  # of tensorboard's own imports
def test_tensorboard_holds_every_scalar_of_every_step(store: Path) -> None:
    pytest.importorskip("tensorboard")
    train(store, "--track", "tensorboard", "--eval-split", "val")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(store / "run" / "tensorboard"))
    events.Reload()
    rows: list[dict[str, Any]] = [scalars(row) for row in metrics(store / "run")]
    assert "eval_acceptance_length" in rows[-1]
    for name in rows[-1].keys() - {"step"}:
        expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in rows if name in row]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected, name


def test_a_tracker_without_its_package_is_refused_by_name(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for track, module in (("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(InputError, match=r"--track: expected the .* package, found none; install"):
            tracking.open_tracker(config(store, track=track), {"id": "0"})
    with pytest.raises(InputError, match="--track: expected one of"):
        config(store, track="yes")
