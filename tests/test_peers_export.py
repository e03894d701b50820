"""A store as speculators' and SpecForge's cache, and back: what comes back is the store, to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.worker_job import CaptureJob
from draftcache.capture.peers.config import ImportConfig
from draftcache.capture.peers.job import run_import
from draftcache.tools.cli import main
from support.capture_jobs import config, small_dataset
from support.peer_files import load, record, save_predictable, write_specforge, write_speculators

LAYERS = (0, 1, 2, 3)
"""All four blocks: the last one's output is the last state."""


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_predictable(tmp_path_factory.mktemp("verifier") / "llama")


@pytest.fixture(scope="module")
def store(verifier: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    rows = record(load(verifier), count=3)
    source = write_speculators(root / "files", rows)
    capture = CaptureConfig(
        verifier=verifier, dataset=root / "prepared", output=root / "store", layers=LAYERS, top_k=16, window=0,
        mode="float32", shard_tokens=60,
    )  # fmt: skip
    imported = ImportConfig(
        peer="speculators", source=source, capture=capture, tokenizer=tokenizer_dir, draft_vocab_size=100,
        masks=str(root / "files.masks.jsonl"), probe=False,
    )  # fmt: skip
    run_import(imported, root / "work", progress=False, workers=1)
    return root / "store"


def test_what_was_imported_from_speculators_comes_back(store: Path, tmp_path: Path) -> None:
    assert main(["convert", str(store), str(tmp_path / "out"), "--to", "speculators"]) == 0
    source = store.parent / "files"
    for number in range(3):
        theirs = load_file(source / f"hs_{number}.safetensors")
        ours = load_file(tmp_path / "out" / "train" / "hidden_states" / f"hs_{number}.safetensors")
        length = len(theirs["token_ids"]) - 2  # the last two tokens have no row at which a draft starts
        assert torch.equal(ours["token_ids"], theirs["token_ids"][:length])
        assert torch.equal(ours["hidden_states"], theirs["hidden_states"][:length])
    described = json.loads((tmp_path / "out" / "draftcache.json").read_text())
    assert described["auxiliary_layer_ids"] == [1, 2, 3]
    assert described["last_state"] == "before the final norm"


def test_specforges_last_state_is_the_verifiers_own_final_norm(store: Path, verifier: Path, tmp_path: Path) -> None:
    expected = write_specforge(tmp_path / "expected", record(load(verifier), count=3))
    assert main(["convert", str(store), str(tmp_path / "out"), "--to", "specforge"]) == 0
    for number in range(3):
        ours = torch.load(tmp_path / "out" / "train" / f"{number:08d}.ckpt", weights_only=True)
        theirs = torch.load(expected / f"data_{number}.ckpt", weights_only=True)
        assert ours.keys() == theirs.keys()
        length = len(theirs["input_ids"]) - 2
        for name, values in theirs.items():
            cut = values[:length] if values.ndim == 1 else values[:, :length]
            assert torch.equal(ours[name], cut), name
            assert ours[name].dtype == values.dtype


def test_a_file_that_is_missing_is_made_again_and_others_stay(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["convert", str(store), str(tmp_path / "out"), "--to", "specforge", "--json"]
    assert main(words) == 0
    missing = tmp_path / "out" / "train" / "00000001.ckpt"
    before = torch.load(missing, weights_only=True)
    missing.unlink()
    capsys.readouterr()
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["files_written"], found["conversations"], found["tokens_left_out"]) == (1, 3, 6)
    again = torch.load(missing, weights_only=True)
    assert all(torch.equal(values, again[name]) for name, values in before.items())


def test_stores_that_lack_what_the_projects_read_are_refused(
    store: Path, verifier: Path, tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = small_dataset(tmp_path, tokenizer_dir)
    for name, changes in (("pruned", {}), ("three", {"window": 0})):
        CaptureJob(config(verifier, dataset, tmp_path / name, splits=("val",), **changes)).run()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    for words, message in (
        (
            [tmp_path / "pruned", tmp_path / "a", "--to", "specforge"],
            "pruned by --window 20: capture again",
        ),
        ([tmp_path / "three", tmp_path / "a", "--to", "specforge"], "expected the last block 3 among the taps"),
        ([store, tmp_path / "a", "--to", "modelopt"], "--to: expected one of ['speculators', 'specforge']"),
        ([store, tmp_path / "a", "--to", "specforge", "--mode", "int8"], "--mode: expected it without --to"),
        ([store, tmp_path / "full", "--to", "specforge"], "expected an empty folder"),
        ([store, tmp_path / "a", "--from", "specforge"], "draftcache import SOURCE --from PROJECT"),
    ):
        assert main(["convert", *map(str, words)]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
