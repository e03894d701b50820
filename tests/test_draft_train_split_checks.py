"""Splits that are misspelt, named twice, or both trained and measured on: refused or said before any work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from draftcache.draft_train.evaluate import evaluate
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.errors import InputError
from draftcache.store.writer import StoreWriter
from support.rank_processes import TRAIN
from support.synthetic import conversation, manifest, turns, write_files, write_store
from support.training_runs import config, flags


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """train and val of 4 conversations each, with nothing in common."""
    write_store(tmp_path / "store")
    return tmp_path


def overlapping(root: Path) -> None:
    """train, more and val of 4 conversations each: all of more and one of val are in train."""
    seeds = ([0, 1, 2, 3], [3, 2, 1, 0], [4, 5, 0, 6])
    with StoreWriter(root / "store", manifest(shards=3, splits=("train", "more", "val")), write_files) as writer:
        for split, numbers in enumerate(seeds):
            items = [
                conversation(np.random.default_rng(seed), turns(40, (6, 16), (22, 37)), number=number, split=split)
                for number, seed in enumerate(numbers)
            ]
            writer.write_shard(split, items, {"quarantined": [], "gates": {}})
        writer.finish()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"splits": ("val", "val")}, r"--splits: expected every split once, .*found \('val', 'val'\)"),
        ({"eval_split": "val", "eval_every": 2, "eval_conversations": 0}, "--eval-conversations: expected at least 1"),
    ],
)
def test_settings_that_do_twice_or_nothing_are_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        config(tmp_path, **changes)


def test_a_misspelt_split_is_refused_before_any_step(store: Path) -> None:
    settings = config(store)
    more = ["--eval-split", "vall", "--eval-every", "2"]
    command = [sys.executable, *TRAIN, *flags(settings), *more]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert (
        f"--eval-split: {store / 'store'}: expected one of the splits ['train', 'val'], found 'vall'" in result.stderr
    )
    assert not settings.output.exists()
    with pytest.raises(InputError, match=r"--splits: .*expected one of the splits .*found 'trian'"):
        Trainer(config(store, splits=("trian",)))


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "store", splits=("train", "val", "empty"))
    with pytest.raises(InputError, match=r"--eval-split: .*expected conversations in \['empty'\], found none"):
        Trainer(config(tmp_path, eval_split="empty", eval_every=2))


def test_what_is_trained_and_measured_on_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overlapping(tmp_path)
    where = tmp_path / "store"
    Trainer(config(tmp_path, eval_split="val", eval_every=2))
    assert f"{where}: 1 of 4 conversations of 'val' are trained on" in capsys.readouterr().err
    Trainer(config(tmp_path, eval_split="train", eval_every=2))
    assert f"{where}: 4 of 4 conversations of 'train' are trained on" in capsys.readouterr().err
    Trainer(config(tmp_path, splits=("train", "more")))
    assert f"{where}: 4 of 4 conversations of 'more' are also in ['train']" in capsys.readouterr().err


def test_splits_with_nothing_in_common_are_not_spoken_of(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The negative control."""
    Trainer(config(store, eval_split="val", eval_every=2))
    Trainer(config(store, splits=("train", "val")))
    assert "conversations of" not in capsys.readouterr().err


def test_evaluation_refuses_before_it_measures(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Trainer(config(store, epochs=1)).run()
    where, run = store / "store", store / "run"
    capsys.readouterr()
    for splits, message in (
        (["val", "val"], r"--splits: expected at least one split and every split once, found \['val', 'val'\]"),
        ([], "--splits: expected at least one split"),
        (["val", "vall"], "--splits: .*found 'vall'"),
    ):
        with pytest.raises(InputError, match=message):
            evaluate(store=where, checkpoint=run, splits=splits)
    for bigram_splits in (["train", "train"], ["trian"]):
        with pytest.raises(InputError, match="--bigram-splits: "):
            evaluate(store=where, checkpoint=run, splits=["val"], bigram_splits=bigram_splits)
    assert "are trained on" not in capsys.readouterr().err
    evaluate(store=where, checkpoint=run, splits=["val", "train"])
    assert capsys.readouterr().err.count("4 of 4 conversations of 'train' are trained on") == 1
