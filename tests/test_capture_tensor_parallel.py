"""`--tensor-parallel N`: a verifier over several processes, by the model class's own plan, beside one that is whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from draftcache.capture.job import tensor_parallel
from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.worker_job import CaptureJob
from draftcache.capture.verifier import load as verifier
from draftcache.capture.verifier import weights
from draftcache.capture.verifier.nemotron import forward as nemotron_forward
from draftcache.store.common.errors import InputError
from draftcache.store.format.array_spec import tap_name
from draftcache.store.format.bf16 import bf16_to_float32
from draftcache.store.format.commits import committed_shards
from draftcache.store.reader import StoreReader
from draftcache.store.storage.base import open_storage
from draftcache.store.verify import verify_store
from support.capture_jobs import config, flags, prepare_rows, write_rows
from support.forked import CLI, started
from support.paths import DEMO
from support.processes import ONE_THREAD, children, wait_for
from support.tiny_models import save_model

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.skipif(
        torch.cuda.device_count() == 1, reason="one GPU can't be shared by ranks, and transformers takes it"
    ),
]
DEADLINE_S = 120


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    root = tmp_path_factory.mktemp("dataset")
    return prepare_rows(root / "prepared", tokenizer_dir, write_rows(root / "rows.jsonl", rows=24))


def start(settings: CaptureConfig) -> subprocess.Popen[str]:
    command = [sys.executable, *CLI, "capture", *flags(settings)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ONE_THREAD)


def run(settings: CaptureConfig, deadline_s: float = DEADLINE_S) -> tuple[int, str]:
    code, _, errors = started([*CLI, "capture", *flags(settings)], ONE_THREAD).ended(deadline_s)
    return code, errors


def sharded(model: Path, dataset: Path, output: Path, **changes: Any) -> CaptureConfig:
    return config(
        model, dataset, output, **{"tensor_parallel": 2, "device": "auto", "compute_dtype": "float32"} | changes
    )


@pytest.mark.parametrize("kind", [pytest.param("llama", marks=pytest.mark.slow), "nemotron_h"])
def test_the_same_store_within_rounding(tmp_path: Path, dataset: Path, kind: str) -> None:
    model = save_model(tmp_path / "model", kind)
    code, errors = run(sharded(model, dataset, tmp_path / "sharded", prefill_chunk=48, mode="bf16"))
    assert code == 0, errors
    CaptureJob(config(model, dataset, tmp_path / "whole", prefill_chunk=48, mode="bf16")).run()
    assert not verify_store(tmp_path / "sharded").damages
    found, expected = StoreReader(tmp_path / "sharded"), StoreReader(tmp_path / "whole")
    assert len(found) == len(expected) == 24
    assert found.files.frozen.read_bytes() == expected.files.frozen.read_bytes()
    for number in range(24):
        mine, theirs = found.read(number).arrays, expected.read(number).arrays
        for layer in found.manifest.layers:
            a, b = (bf16_to_float32(arrays[tap_name(layer)]) for arrays in (mine, theirs))
            assert np.linalg.norm(a - b) < 2e-3 * np.linalg.norm(b)
        np.testing.assert_allclose(mine["log_z_full"], theirs["log_z_full"], atol=1e-3)
    provenance = next(found.records())["provenance"]
    assert provenance["tensor_parallel"] == 2


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_trained_weights_in_bf16_on_two_gpus(tmp_path: Path, dataset: Path) -> None:
    layers = (2, 5, 10)
    both = {"layers": layers, "mode": "bf16", "compute_dtype": "bfloat16", "allow_fallback": True}
    for name, more in (("whole", {"tensor_parallel": 1, "device": "cuda:0"}), ("sharded", {})):
        code, errors = run(sharded(DEMO, dataset, tmp_path / name, **both | more), deadline_s=300)  # compiles
        assert code == 0, errors
    found, expected = StoreReader(tmp_path / "sharded"), StoreReader(tmp_path / "whole")
    worst = dict.fromkeys(layers, 0.0)
    for number in range(24):
        for layer in layers:
            a, b = (bf16_to_float32(store.read(number).arrays[tap_name(layer)]) for store in (found, expected))
            worst[layer] = max(worst[layer], float(np.linalg.norm(a - b) / np.linalg.norm(b)))
    print("relative difference of two ranks to one, by block:", worst)
    assert 0 < max(worst.values()) < 2e-2


def test_without_the_sum_over_ranks_the_self_check_refuses(
    tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: half of every expert is not the expert, and start-up says so."""
    model = save_model(tmp_path / "model", "nemotron_h")
    parts = nemotron_forward._local_experts
    monkeypatch.setattr(nemotron_forward, "_local_experts", lambda up, down: (*parts(up, down)[:2], None))
    monkeypatch.setattr(tensor_parallel, "_LAST_WORDS_S", 600.0)
    with pytest.raises(InputError, match=r"too much in blocks \[1, 4\]"):
        CaptureJob(sharded(model, dataset, tmp_path / "s"))
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("victim", [pytest.param("follower", marks=pytest.mark.slow), "worker"])
def test_a_dead_rank_ends_the_worker_and_the_same_command_goes_on(tmp_path: Path, dataset: Path, victim: str) -> None:
    model = save_model(tmp_path / "model", "nemotron_h")
    settings = sharded(model, dataset, tmp_path / "s")
    with start(settings) as process:
        wait_for(lambda: committed_shards(open_storage(tmp_path / "s")))
        (follower,) = children(process.pid)
        os.kill(follower if victim == "follower" else process.pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=DEADLINE_S)
    wait_for(lambda: not Path(f"/proc/{follower}").exists())
    if victim == "follower":
        assert process.returncode == 3
        assert "expected 1 followers of this worker" in errors
        assert "found exit codes [-9]" in errors
    shards = StoreReader(tmp_path / "s", allow_partial=True).manifest.shards
    assert 0 < len(committed_shards(open_storage(tmp_path / "s"))) < shards
    assert run(settings)[0] == 0
    assert not verify_store(tmp_path / "s").damages


def test_what_does_not_fit_is_refused(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_model(tmp_path / "model", "nemotron_h")
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (1000, 2000))
    with pytest.raises(
        InputError, match=r"expected weights of at most the 0\.0 GB that are free .* --tensor-parallel N"
    ):
        verifier.load_verifier(model, device=gpu, dtype=torch.bfloat16, trust_remote_code=False)
    stored = sum(file.stat().st_size for file in model.glob("*.safetensors"))  # in float32
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (stored * 3 // 4, stored))
    weights.require_room(model, gpu, torch.bfloat16)
    with pytest.raises(InputError, match="--tensor-parallel N"):
        weights.require_room(model, gpu, torch.float32)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device, number in (("cuda", 4), ("cuda:2", 2)):
        with pytest.raises(InputError, match=rf"--tensor-parallel {number}: expected {number} GPUs .*found 3 in all"):
            tensor_parallel.first_gpu(sharded(model, dataset, tmp_path / "s", tensor_parallel=number, device=device))
    with pytest.raises(InputError, match="--device cpu: expected GPUs for --tensor-parallel 2"):
        tensor_parallel.first_gpu(sharded(model, dataset, tmp_path / "s", device="cpu"))


def test_a_model_without_a_plan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig

    model = save_model(tmp_path / "model", "llama")
    monkeypatch.setattr(LlamaConfig, "base_model_tp_plan", None)
    with pytest.raises(InputError, match="expected a tensor-parallel plan for --tensor-parallel 2, found none"):
        verifier.load_verifier(
            model, device=torch.device("cpu"), dtype=torch.float32, trust_remote_code=False, tensor_parallel=2
        )


def test_missing_weights_are_refused_by_every_rank(tmp_path: Path, dataset: Path) -> None:
    model = save_model(tmp_path / "model", "llama")
    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    code, errors = run(sharded(model, dataset, tmp_path / "s"))
    assert code == 2, errors
    assert "no file holds: lm_head.weight" in errors
