"""Stores, prepared datasets and checkpoints that an earlier draftcache wrote still open, and give what they held."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draftcache.capture.prepare.token_dataset import TokenDataset
from draftcache.draft_train.checkpoint import load_state, resolve_checkpoint
from draftcache.draft_train.drafts.eagle3.shape import Eagle3Shape
from draftcache.draft_train.evaluate import evaluate
from draftcache.draft_train.export import export
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.sealed_json import unseal
from draftcache.store.format.vocab_map import VocabMap
from draftcache.store.reader import StoreReader
from draftcache.store.verify import verify_store
from support.synthetic import LAYERS, vocab_map, write_store
from support.training_runs import config

ARCHIVE = Path(__file__).parent / "recorded" / "written_by_2f810a2.tar.gz"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """store/, run/ (trained from it to the end) and prepared/, as commit 2f810a2 wrote them."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_an_old_store_is_whole_and_equals_a_new_one(old: Path) -> None:
    assert verify_store(old / "store").damages == []
    write_store(old / "new", per_shard=2)
    before, now = StoreReader(old / "store"), StoreReader(old / "new")
    assert before.manifest.hash == now.manifest.hash
    assert before.manifest.layers == LAYERS
    for number in range(len(before)):
        first, second = before.read(number).arrays, now.read(number).arrays
        assert first.keys() == second.keys()
        assert all(np.array_equal(first[name], second[name]) for name in first)


def test_files_of_new_shards_are_the_old_ones_byte_for_byte(old: Path) -> None:
    write_store(old / "new", per_shard=2)
    files = [path for path in (old / "store").rglob("*") if path.is_file() and ".locks" not in path.parts]
    assert len(files) > 30
    for path in files:
        new = old / "new" / path.relative_to(old / "store")
        if path.parent.name == "commit":
            assert said_by_the_old(unseal(new.read_bytes(), ""), new.stem) == unseal(path.read_bytes(), ""), path.name
        else:
            assert new.read_bytes() == path.read_bytes(), path.name


def said_by_the_old(record: dict[str, Any], stem: str) -> dict[str, Any]:
    """A new commit record without what binds it and its files to their place, which old records do not say."""
    for entry in record["files"].values():
        entry.pop("end_xxh3_128", None)
    if not stem.isdecimal():
        del record["manifest_hash" if stem == "index" else "settings_hash"]
    return record


def test_old_records_hold_nothing_of_what_new_ones_check(old: Path) -> None:
    """The two above would pass as well if the recorded store were of today."""
    records = [unseal(path.read_bytes(), "") for path in (old / "store" / "commit").iterdir()]
    assert not any("end_xxh3_128" in entry for record in records for entry in record["files"].values())
    assert "settings_hash" not in unseal((old / "store" / "commit" / "frozen.json").read_bytes(), "")
    reader = StoreReader(old / "store")
    assert reader.files.frozen.is_file()
    assert [len(reader.read(number).arrays) > 0 for number in range(len(reader))] == [True] * len(reader)


def test_an_old_run_resumes_is_evaluated_and_exported(old: Path) -> None:
    path = resolve_checkpoint(old / "run")
    state = load_state(path)
    assert (state.architecture, state.step, state.finished) == ("eagle3", 2, True)
    assert isinstance(state.shape, Eagle3Shape)
    assert (state.shape.fc_norm, state.shape.norm_output) == (False, False)  # fields that it does not have
    assert Trainer(config(old, epochs=2, checkpoint_every=1, keep_checkpoints=1)).run() == path
    figures = evaluate(store=old / "store", checkpoint=old / "run", splits=["val"])
    assert figures["splits"]["val"]["draft"]["verify_steps"] > 0
    export(old / "run", old / "draft", engine="vllm")
    assert VocabMap.load(path / "vocab_map.safetensors").hash == vocab_map().hash


def test_an_old_prepared_dataset_opens(old: Path) -> None:
    dataset = TokenDataset.open(old / "prepared")
    dataset.verify()
    token_ids, loss_mask, _ = dataset.split("train")[3]
    assert len(dataset.split("train")) == 5
    assert 0 < loss_mask.sum() < token_ids.size
