"""Caches that other projects' own packages write and read. Their packages live outside of this environment.

Set DRAFTCACHE_PEER_PACKAGES to the folders that hold them, as in PYTHONPATH (with `pip install --no-deps --target`:
speculators, hs-connectors, specforge, nvidia-modelopt, nemo-automodel, datasets, openai and what they import, but no
other torch). speculators 0.9.0, SpecForge 0.2.0, ModelOpt 0.47.0 and NeMo Automodel 0.7.0 were run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.peers.config import ImportConfig
from draftcache.capture.peers.job import run_import
from draftcache.store.reader import StoreReader
from draftcache.tools.cli import main
from support.peer_files import (
    Recorded,
    load,
    record,
    save_predictable,
    write_modelopt,
    write_specforge,
    write_speculators,
)

PACKAGES = os.environ.get("DRAFTCACHE_PEER_PACKAGES", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PACKAGES, reason="set DRAFTCACHE_PEER_PACKAGES to the folders of other projects' packages"),
]
SCRIPT = Path(__file__).parent / "support" / "peer_trainers.py"
LAYERS = (0, 1, 2, 3)


def peer(action: str, folder: Path, output: Path) -> dict[str, torch.Tensor]:
    """What their code gives, by "N.name"."""
    command = [sys.executable, SCRIPT, action, folder, output]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": PACKAGES})
    assert ran.returncode == 0, ran.stderr[-4000:]
    return load_file(output)


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_predictable(tmp_path_factory.mktemp("verifier") / "llama")


@pytest.fixture(scope="module")
def rows(verifier: Path) -> list[Recorded]:
    return record(load(verifier), count=3)


@pytest.fixture(scope="module")
def store(
    verifier: Path, rows: list[Recorded], tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> StoreReader:
    """Every row of `rows`, imported from speculators' layout with the last block as a tap."""
    root = tmp_path_factory.mktemp("store")
    return imported(root, verifier, tokenizer_dir, write_speculators(root / "files", rows))


def imported(root: Path, verifier: Path, tokenizer: Path, source: Path) -> StoreReader:
    capture = CaptureConfig(
        verifier=verifier, dataset=root / "prepared", output=root / "store", layers=LAYERS, top_k=16, window=0,
        mode="float32", shard_tokens=60,
    )  # fmt: skip
    settings = ImportConfig(
        peer="speculators", source=source, capture=capture, tokenizer=tokenizer, draft_vocab_size=100,
        masks=str(source.parent / f"{source.name}.masks.jsonl"),
    )  # fmt: skip
    run_import(settings, root / "work", progress=False, workers=1)
    return StoreReader(root / "store")


def test_specforge_reads_the_layout_that_is_imported_and_the_one_that_is_written(
    store: StoreReader, rows: list[Recorded], tmp_path: Path
) -> None:
    fixture = peer("read_specforge", write_specforge(tmp_path / "fixture", rows), tmp_path / "a.safetensors")
    assert main(["convert", store.location, str(tmp_path / "out"), "--to", "specforge"]) == 0
    ours = peer("read_specforge", tmp_path / "out", tmp_path / "b.safetensors")
    assert ours.keys() == fixture.keys()
    for name, values in fixture.items():
        length = values.shape[1] - 2
        cut = values[:, :length].clone()
        if name.endswith("loss_mask"):
            cut[:, -1] = 0  # SpecForge's reader takes the last token out of the loss
        assert torch.equal(ours[name], cut), name
    assert torch.equal(fixture["0.target"][0], rows[0].after)


def test_speculators_reads_what_is_written(store: StoreReader, rows: list[Recorded], tmp_path: Path) -> None:
    assert main(["convert", store.location, str(tmp_path / "out"), "--to", "speculators"]) == 0
    found = peer("read_speculators", tmp_path / "out" / "train", tmp_path / "a.safetensors")
    for number, row in enumerate(rows):
        length = len(row.token_ids) - 2
        assert np.array_equal(found[f"{number}.input_ids"].numpy(), row.token_ids[:length])
        assert np.array_equal(found[f"{number}.loss_mask"].numpy(), row.loss_mask[:length])
        assert torch.equal(found[f"{number}.hidden_states"], row.taps[:length].flatten(1))
        assert torch.equal(found[f"{number}.verifier_last_hidden_states"], row.before[:length])


def test_the_dataset_that_is_written_gives_the_masks_of_an_import(
    store: StoreReader, verifier: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    """What goes out to speculators comes in again, with `--masks` naming the dataset beside the states."""
    assert main(["convert", store.location, str(tmp_path / "out"), "--to", "speculators"]) == 0
    data = str(tmp_path / "out" / "train")
    words = ["import", data, "--from", "speculators", "--masks", data, "--verifier", str(verifier), "--tokenizer",
             str(tokenizer_dir), "--layers", "0,1,2", "--draft-vocab-size", "90", "--output", str(tmp_path / "again"),
             "--top-k", "16", "--mode", "float32"]  # fmt: skip
    assert main(words) == 0
    assert len(StoreReader(tmp_path / "again")) == 3


def test_float8_of_the_connectors_own_code_is_read_as_its_own_code_reads_it(
    verifier: Path, rows: list[Recorded], tokenizer_dir: Path, tmp_path: Path
) -> None:
    source = write_speculators(tmp_path / "files", rows)
    theirs = peer("write_float8", source, tmp_path / "a.safetensors")
    store = imported(tmp_path, verifier, tokenizer_dir, source)
    for number in range(3):
        arrays = store.read(number).arrays
        key = next(
            key.split(".")[0]
            for key, ids in theirs.items()
            if key.endswith("token_ids") and np.array_equal(ids.numpy(), arrays["token_ids"])
        )
        states = theirs[f"{key}.hidden_states"].float()[arrays["positions"]]
        for place, layer in enumerate(LAYERS):
            assert np.array_equal(arrays[f"tap_{layer}"], states[:, place].numpy())


def test_modelopt_reads_the_layout_that_is_imported(rows: list[Recorded], tmp_path: Path) -> None:
    source = write_modelopt(tmp_path / "files", rows, before_norm=True)
    found = peer("read_modelopt", source, tmp_path / "a.safetensors")
    for number, row in enumerate(rows):
        assert torch.equal(found[f"{number}.base_model_hidden_states"], row.before)
        assert torch.equal(found[f"{number}.aux_hidden_states"], row.taps.flatten(1))
        assert np.array_equal(found[f"{number}.loss_mask"].numpy(), row.loss_mask)
        assert bool(found[f"{number}.base_hidden_prenorm"])


def test_automodels_own_capture_is_imported(
    verifier: Path, rows: list[Recorded], tokenizer_dir: Path, tmp_path: Path
) -> None:
    """States that its target wrapper captures from padded rows; the last block's id stands for the final norm there."""
    (tmp_path / "model").symlink_to(verifier)
    width = max(len(row.token_ids) for row in rows) + 5
    padded = {
        name: torch.zeros(len(rows), width, dtype=torch.long) for name in ("input_ids", "attention_mask", "loss_mask")
    }
    for number, row in enumerate(rows):
        length = len(row.token_ids)
        padded["input_ids"][number, :length] = torch.from_numpy(row.token_ids)
        padded["attention_mask"][number, :length] = 1
        padded["loss_mask"][number, :length] = torch.from_numpy(row.loss_mask).long()
    save_file(padded, tmp_path / "rows.safetensors")
    theirs = peer("capture_automodel", tmp_path, tmp_path / "a.safetensors")
    source, output = tmp_path / "cache", tmp_path / "store"
    words = ["import", str(source), "--from", "automodel", "--verifier", str(verifier), "--tokenizer",
             str(tokenizer_dir), "--draft-vocab-size", "90", "--output", str(output), "--top-k", "16", "--mode",
             "float32", "--window", "0", "--probe"]  # fmt: skip
    assert main(words) == 0
    store = StoreReader(output)
    assert store.manifest.layers == (0, 1)
    assert store.manifest.provenance["import"]["states_left_out"] == ["the final norm's output (layer id 3)"]
    for number, row in enumerate(rows):
        arrays = store.read(number).arrays
        assert np.array_equal(arrays["token_ids"], row.token_ids)
        assert np.array_equal(arrays["loss_mask"], row.loss_mask)
        states = theirs[f"{number}.target_hidden_states"].reshape(width, 3, -1)[arrays["positions"]]
        for place in (0, 1):
            assert np.array_equal(arrays[f"tap_{place}"], states[:, place].numpy())
        last = theirs[f"{number}.target_last_hidden_states"][: len(row.token_ids)]
        torch.testing.assert_close(last, row.after, rtol=1e-4, atol=1e-4)
