"""Checkpoints: any changed, missing or exchanged byte of one is refused when it is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from draftcache.draft_train.checkpoint import best_checkpoint, checkpoints, load_state
from draftcache.draft_train.export import export
from draftcache.draft_train.state_file import STATE_NAME
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.errors import CheckpointError
from draftcache.store.common.sealed_json import SEAL
from draftcache.store.common.tensor_files import save_tensors
from support.synthetic import write_store
from support.training_runs import config, rewrite_state

FILES = ("model.safetensors", "optimizer.safetensors", "vocab_map.safetensors")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """store/ and run/, which has two checkpoints, the last of them finished."""
    root = tmp_path_factory.mktemp("trained")
    write_store(root / "store")
    Trainer(config(root, epochs=2, eval_split="val", eval_every=2)).run()
    assert len(checkpoints(root / "run")) > 1
    return root


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run for one test, beside a link to its store."""
    (tmp_path / "store").symlink_to(trained / "store")
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


def changed(data: bytes, position: int, bit: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


def test_every_changed_byte_of_the_state_is_refused(run: Path) -> None:
    last = checkpoints(run)[-1]
    file, rng = last / STATE_NAME, np.random.default_rng(0)
    whole = file.read_bytes()
    for position in range(len(whole)):
        file.write_bytes(changed(whole, position, int(rng.integers(8))))
        with pytest.raises(CheckpointError, match=r"state\.json"):
            load_state(last)
    for size in range(0, len(whole), 97):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"state\.json"):
            load_state(last)
    file.write_bytes(whole)
    assert load_state(last).finished  # the negative control


@pytest.mark.parametrize("name", FILES)
def test_every_changed_cut_missing_or_exchanged_file_is_refused(run: Path, name: str) -> None:
    first, last = checkpoints(run)[-2:]
    file, rng = last / name, np.random.default_rng(1)
    whole = file.read_bytes()
    wrong = [changed(whole, int(position), int(rng.integers(8))) for position in rng.integers(0, len(whole), 40)]
    wrong += [whole[:-1], whole + b"\0", b""]
    if name != "vocab_map.safetensors":  # which is the same in both checkpoints
        wrong.append((first / name).read_bytes())
    for data in wrong:
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=f"{name}: expected xxh3-128"):
            load_state(last)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{name}: expected a file of the checkpoint, found none"):
        load_state(last)


def test_a_number_that_became_infinite_is_a_change_too(run: Path) -> None:
    last = checkpoints(run)[-1]
    text = (last / STATE_NAME).read_text()
    assert '"rms_norm_eps": 1e-05' in text
    (last / STATE_NAME).write_text(text.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 1e905'))
    with pytest.raises(CheckpointError, match=r"state\.json.*the number 1e905 is too large"):
        load_state(last)


def test_a_changed_tap_exports_nothing(run: Path, tmp_path: Path) -> None:
    last = checkpoints(run)[-1]
    body = json.loads((last / STATE_NAME).read_text())
    body["taps"][0]["layer"] += 1
    (last / STATE_NAME).write_text(json.dumps(body, indent=2) + "\n")
    with pytest.raises(CheckpointError, match=r"state\.json: expected values that hash to"):
        export(last, tmp_path / "draft", engine="vllm")
    assert not (tmp_path / "draft").exists()


def test_the_hash_cannot_be_left_out_of_a_new_state(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A state of version 1 has none, and is read with a line that says so."""
    last = checkpoints(run)[-1]
    body = json.loads((last / STATE_NAME).read_text())
    del body[SEAL]
    (last / STATE_NAME).write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match="expected draftcache-checkpoint version 2 with its hash"):
        load_state(last)
    assert capsys.readouterr().err == ""
    (last / STATE_NAME).write_text(json.dumps(body | {"version": 1}))
    assert load_state(last).finished
    assert f"{last / STATE_NAME}: an earlier version of draftcache wrote it without" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["shape", "dtype", "missing", "more"])
def test_an_optimizer_of_other_tensors_is_refused_by_name(run: Path, tmp_path: Path, fault: str) -> None:
    """These hashes are right: another program, or another version, wrote the tensors."""
    last = checkpoints(run)[-1]
    tensors = load_file(last / "optimizer.safetensors")
    name = "fc.weight/exp_avg"
    if fault == "shape":
        tensors[name] = tensors[name].T.contiguous()
    elif fault == "dtype":
        tensors[name] = tensors[name].to(torch.bfloat16)
    elif fault == "missing":
        del tensors[name]
    else:
        name = "other.weight/exp_avg"
        tensors[name] = torch.zeros(3)
    save_tensors(last / "optimizer.safetensors", tensors)
    rewrite_state(last, lambda body: None)
    with pytest.raises(CheckpointError, match=rf"optimizer\.safetensors: {name}: expected .*, found "):
        Trainer(config(tmp_path, epochs=2)).run()


def test_a_model_of_another_dtype_is_refused_by_name(run: Path, tmp_path: Path) -> None:
    last = checkpoints(run)[-1]
    tensors = load_file(last / "model.safetensors")
    tensors["fc.weight"] = tensors["fc.weight"].to(torch.bfloat16)
    save_tensors(last / "model.safetensors", tensors)
    rewrite_state(last, lambda body: None)
    with pytest.raises(CheckpointError, match=r"fc\.weight: expected .* float32, found .* bfloat16"):
        Trainer(config(tmp_path, epochs=2)).run()


def test_a_best_record_that_the_checkpoint_contradicts_is_refused(run: Path) -> None:
    assert best_checkpoint(run) is not None
    record = json.loads((run / "best.json").read_text())
    (run / "best.json").write_text(json.dumps(record | {"eval_acceptance_length": 9.0}))
    with pytest.raises(CheckpointError, match=r"best\.json: expected the acceptance length of step_.*, found 9\.0"):
        best_checkpoint(run)
