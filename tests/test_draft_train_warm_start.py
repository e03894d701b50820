"""Warm start: weights of another run, and the rows of its head under another draft vocabulary."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from draftcache.draft_train import warm_start
from draftcache.draft_train.checkpoint import checkpoints
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.errors import CheckpointError, InputError
from draftcache.store.format.vocab_map import VocabMap
from support.synthetic import vocab_map, write_store
from support.training_runs import config, metrics

HEAD = "lm_head.weight"


@pytest.fixture
def stage_one(tmp_path: Path) -> Path:
    """A finished run over a store with the vocabulary of seed 0."""
    write_store(tmp_path / "store")
    Trainer(config(tmp_path)).run()
    return tmp_path


@pytest.fixture
def other_store(stage_one: Path, monkeypatch: pytest.MonkeyPatch) -> VocabMap:
    """Write `other`, a store with as many draft ids that stand for other tokens; return the first store's map."""
    first, other = vocab_map(), vocab_map(seed=1)
    monkeypatch.setattr("support.synthetic.vocab_map", lambda seed=0: other)
    write_store(stage_one / "other", draft_vocab_hash=other.hash)
    return first


def second(tmp_path: Path, **changes: object) -> Trainer:
    """Return a trainer over `other` that starts from the first run's weights."""
    values = {"store": tmp_path / "other", "output": tmp_path / "two", "init_from": tmp_path / "run"} | changes
    return Trainer(config(tmp_path, **values))


def test_remapped_head_rows_follow_their_tokens(
    stage_one: Path, other_store: VocabMap, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = second(stage_one, remap_vocab=True)
    fresh = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer._restore()
    first = load_file(checkpoints(stage_one / "run")[-1] / "model.safetensors")
    before = other_store.target_ids.tolist()
    shared = 0
    for row, token in enumerate(trainer.vocab_map.target_ids.tolist()):
        expected = fresh[HEAD][row]
        if token in before:
            shared += 1
            expected = first[HEAD][before.index(token)]
        assert torch.equal(trainer.model.state_dict()[HEAD][row], expected)
    for name in first.keys() - {HEAD}:
        assert torch.equal(trainer.model.state_dict()[name], first[name])
    assert 0 < shared < len(before)
    assert f"{shared} of {len(before)} head rows were moved" in capfd.readouterr().err
    assert trainer.step == 0
    assert not trainer.optimizer.state


def test_a_permuted_head_would_load_unnoticed_and_is_refused(
    stage_one: Path, other_store: VocabMap, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both maps have as many ids, so all shapes fit; but from the first id on that differs, rows are other tokens'."""
    trainer = second(stage_one)
    with pytest.raises(CheckpointError, match=r"its draft vocabulary is .*--remap-vocab to move its head rows"):
        trainer._restore()

    right = second(stage_one, remap_vocab=True)
    right._restore()
    monkeypatch.setattr(warm_start, "require_vocabulary", lambda *_: None)  # the bug, on purpose
    trainer._restore()
    shared = np.flatnonzero(other_store.padded(trainer.vocab_map.vocab_size).t2d[trainer.vocab_map.target_ids])
    permuted, moved = (item.model.state_dict()[HEAD][torch.from_numpy(shared)] for item in (trainer, right))
    assert (permuted != moved).any(dim=1).float().mean() > 0.5
    trainer.run()  # the bug trains without a complaint


def test_remapping_to_the_same_vocabulary_moves_every_row_to_its_place(stage_one: Path) -> None:
    plain = second(stage_one, store=stage_one / "store")
    moved = second(stage_one, store=stage_one / "store", output=stage_one / "three", remap_vocab=True)
    for trainer in (plain, moved):
        trainer.run()
    assert metrics(stage_one / "two")[-1]["loss"] == metrics(stage_one / "three")[-1]["loss"]


def test_remapping_still_refuses_another_shape(stage_one: Path, other_store: VocabMap) -> None:
    with pytest.raises(CheckpointError, match="its draft intermediate_size is 24, here it is 8"):
        second(stage_one, remap_vocab=True, intermediate_size=8).run()


def test_remapping_needs_a_run_to_start_from(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--remap-vocab: expected --init-from with it"):
        config(tmp_path, remap_vocab=True)


def test_resuming_after_a_remapped_start_needs_no_remapping(stage_one: Path, other_store: VocabMap) -> None:
    second(stage_one, remap_vocab=True).run()
    second(stage_one, remap_vocab=True, epochs=4).run()
    assert len(checkpoints(stage_one / "two")) > 0
