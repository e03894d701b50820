"""Runs side by side on one reading of the store: each gives the bits that it gives alone."""

from __future__ import annotations

import itertools
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from draftcache.draft_train.checkpoint import checkpoints
from draftcache.draft_train.data.frozen import TrainingSource
from draftcache.draft_train.side_by_side import Steps, train_side_by_side
from draftcache.draft_train.split_checks import trained_members
from draftcache.draft_train.trainer import Trainer, TrainingStopped
from draftcache.store.common.errors import DraftcacheError, InputError
from draftcache.store.common.stopping import StopRequest
from draftcache.store.layouts.zarr_reader import ZarrShard
from draftcache.store.reader import StoreReader
from support.synthetic import TOP_K, write_store
from support.teacher_stores import SUBSET, write_teacher_store
from support.training_runs import config, metrics

VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "rate": {"learning_rate": 3e-3, "loss": "tv"},
    "window": {"sliding_window": 5},
    "unroll": {"ttt_steps": 2},
    "vocab": {"draft_vocab_size": SUBSET},
    "entries": {"top_k": 3},
    "weights": {"seed": 4, "order_seed": 0},
}
COMMON: dict[str, object] = {"order_seed": 0, "eval_split": "val", "eval_every": 3, "batch_conversations": 3}
TIMES = ("tokens_per_second", "data_wait_share")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of top-k entries with a smaller draft vocabulary inside the main one."""
    root = tmp_path_factory.mktemp("side_by_side")
    write_teacher_store(root / "store", "draft", bf16=False)
    return root


def together(root: Path, names: list[str], stop: StopRequest | None = None, **changes: Any) -> list[Trainer]:
    source = TrainingSource(root / "store")
    return [
        Trainer(config(root, output=root / f"with-{name}", **COMMON | VARIANTS[name] | changes), None, stop, source)
        for name in names
    ]


def train(trainers: list[Trainer], **options: Any) -> list[DraftcacheError | None]:
    with ExitStack() as stack:
        for trainer in trainers:
            stack.enter_context(trainer.started())
        return train_side_by_side(trainers, **options)


def require_same_run(mine: Path, theirs: Path) -> None:
    first, second = checkpoints(mine)[-1], checkpoints(theirs)[-1]
    assert first.name == second.name
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = load_file(first / name), load_file(second / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    rows = [[{key: row[key] for key in row if key not in TIMES} for row in metrics(run)] for run in (mine, theirs)]
    assert rows[0] == rows[1]
    assert "eval_acceptance_length" in rows[0][-1]


def test_each_run_has_the_bits_of_its_run_alone(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, changes in VARIANTS.items():
        Trainer(config(store, output=store / f"alone-{name}", **COMMON | changes)).run()
    read = Counter[tuple[int, str, int]]()
    original = ZarrShard.read

    def counted(self: ZarrShard, row: np.void, name: str, *rest: Any) -> Any:
        if name.startswith("tap"):
            read[int(row["dataset_index"]), name, int(row["split"])] += 1
        return original(self, row, name, *rest)

    monkeypatch.setattr(ZarrShard, "read", counted)
    assert train(together(store, list(VARIANTS))) == [None] * len(VARIANTS)
    for name in VARIANTS:
        require_same_run(store / f"with-{name}", store / f"alone-{name}")
    assert {times for (*_, split), times in read.items() if split == 0} == {4}  # once in each of four epochs
    losses = {metrics(store / f"with-{name}")[0]["loss"] for name in VARIANTS}
    assert len(losses) == len(VARIANTS)  # negative control: the runs do differ, from the first step on


def test_runs_that_were_killed_at_different_steps_go_on_together(store: Path, tmp_path: Path) -> None:
    (tmp_path / "store").symlink_to(store / "store")
    alone = Trainer(config(tmp_path, output=tmp_path / "alone", **COMMON))
    alone.run()
    first, second = together(tmp_path, ["plain", "window"])
    ended = {first.config.output: 3, second.config.output: 5}
    train(
        [first, second],
        goes_on=lambda steps: [record["step"] < ended[item.config.output] for item, record in steps],
    )
    assert [checkpoints(item.config.output)[-1].name[-1] for item in (first, second)] == ["3", "5"]
    assert train(together(tmp_path, ["plain", "window"])) == [None, None]
    require_same_run(tmp_path / "with-plain", tmp_path / "alone")


def test_one_run_that_fails_leaves_the_others_alone(
    store: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store").symlink_to(store / "store")
    trainers = together(tmp_path, ["plain", "rate"])
    alone = Trainer(config(tmp_path, output=tmp_path / "alone", **COMMON))
    alone.run()
    broken = trainers[1]
    restore = broken._restore

    def restore_and_break() -> None:
        restore()
        with torch.no_grad():
            next(broken.model.parameters()).fill_(torch.inf)

    broken._restore = restore_and_break  # type: ignore[method-assign]
    good, bad = train(trainers)
    assert good is None
    assert "expected a finite loss and gradient" in str(bad)
    assert "with-rate: this run ends: step 0" in capfd.readouterr().err
    require_same_run(tmp_path / "with-plain", tmp_path / "alone")


def test_a_stop_saves_every_run(store: Path, tmp_path: Path) -> None:
    (tmp_path / "store").symlink_to(store / "store")
    stop = StopRequest()
    trainers = together(tmp_path, ["plain", "window"], stop)

    def ask(steps: Steps) -> list[bool]:
        if steps[0][1]["step"] == 4:
            stop.ask()
        return [True] * len(steps)

    with pytest.raises(TrainingStopped):
        train(trainers, goes_on=ask)
    assert {checkpoints(item.config.output)[-1].name for item in trainers} == {"step_00000005"}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"order_seed": 1}, "order_seed"),
        ({"order": "bucketed"}, "order"),
        ({"data_share": 0.5}, "data_share"),
        ({"epochs": 2}, "epochs"),
        ({"splits": ("val",)}, "splits"),
    ],
)
def test_runs_that_read_other_data_are_refused(store: Path, change: dict[str, object], name: str) -> None:
    trainers = [Trainer(config(store)), Trainer(config(store, output=store / "other", **change))]
    with pytest.raises(InputError, match=f"other: expected the {name} of "):
        train_side_by_side(trainers)


def test_a_smaller_share_of_the_data_is_a_part_of_a_larger_one(tmp_path: Path) -> None:
    write_store(tmp_path / "store", per_shard=10)
    reader = StoreReader(tmp_path / "store")
    shares = [trained_members(reader, config(tmp_path, data_share=share)).tolist() for share in (0.2, 0.5, 0.95, 1.0)]
    assert [len(share) for share in shares] == [2, 5, 10, 10]
    for smaller, larger in itertools.pairwise(shares):
        assert set(smaller) <= set(larger)
    assert shares[1] != sorted(reader.members("train").tolist())[:5]  # not by position
    for share in (0.0, 1.5):
        with pytest.raises(InputError, match="--data-share: expected above 0 and at most 1"):
            config(tmp_path, data_share=share)


def test_more_entries_than_are_stored_are_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "store")
    Trainer(config(tmp_path, top_k=TOP_K))
    with pytest.raises(InputError, match=f"--top-k: expected at most the {TOP_K} entries .*, found {TOP_K + 1}"):
        Trainer(config(tmp_path, top_k=TOP_K + 1))
    write_teacher_store(tmp_path / "states", "hidden", bf16=False)
    with pytest.raises(InputError, match="expected at most no --top-k: states are stored"):
        Trainer(config(tmp_path, store=tmp_path / "states", top_k=1))
