"""`draftcache capture --engine` with a real vLLM, beside a capture of the same verifier by transformers.

Set DRAFTCACHE_VLLM_PYTHON to an interpreter that has vLLM (0.32 on a CPU and 0.26 on an H200 were run), then `pytest
-m slow tests/test_capture_engine_vllm.py`. On a GPU vLLM's own connector is used, with bounds for TF32 products.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from draftcache.capture.engine.config import EngineConfig
from draftcache.capture.engine.job import capture_from_engine
from draftcache.capture.engine.serving import FOLDER, layer_ids, serve_command
from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.launch import capture
from draftcache.store.common.errors import InputError, ServerError
from draftcache.store.reader import StoreReader
from draftcache.store.verify import verify_store
from draftcache.tools.engine_check.subjects import LLAMA_VOCABULARY, save_llama
from support.capture_jobs import prepare_rows
from support.paths import ROOT

PYTHON = os.environ.get("DRAFTCACHE_VLLM_PYTHON", "")
LAYERS, BLOCKS = (1, 2, 4), 6
LONGEST = 200
START_SECONDS = 300.0
ON_GPU = torch.cuda.is_available()
WITHIN, OF_STATES = (1e-2, 5e-3) if ON_GPU else (1e-4, 1e-5)
"""Bounds of absolute differences of states and normalisers, and of the check's relative ones."""


@contextmanager
def served(model: Path, layers: tuple[int, ...], folder: Path, log: Path) -> Iterator[str]:
    """Start vLLM by the command that capture gives, on a CPU with a connector for CPUs, and end it with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ids = layer_ids(layers, BLOCKS)
    command = serve_command(model, AutoConfig.from_pretrained(model), ids, LONGEST + 1).replace(FOLDER, str(folder))
    if not ON_GPU:
        named = '"ExtractsOnCpu", "kv_connector_module_path": "extracts_on_cpu"'
        command = command.replace('"ExampleHiddenStatesConnector"', named)
    words = shlex.split(command)
    words += ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "4", "--port", str(port)]
    path = os.pathsep.join([str(ROOT / "tests" / "support"), os.environ.get("PYTHONPATH", "")])
    more = {"PYTHONPATH": path, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [PYTHON, "-m", "vllm.entrypoints.cli.main", *words[1:]], stdout=output, stderr=output,
            env=os.environ | more, start_new_session=True,
        )  # fmt: skip
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _answers(f"http://127.0.0.1:{port}/version"):
                assert process.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def write_random_rows(path: Path, count: int = 40) -> Path:
    """Conversations of random ids, 40 to LONGEST tokens each."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            length = LONGEST if number == 0 else draw.randrange(40, LONGEST)
            ids = [draw.randrange(3, LLAMA_VOCABULARY) for _ in range(length)]
            file.write(json.dumps({"token_ids": ids, "loss_mask": [0] * 8 + [1] * (length - 8)}) + "\n")
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not PYTHON, reason="set DRAFTCACHE_VLLM_PYTHON to an interpreter that has vLLM")
def test_a_capture_from_vllm_is_that_of_transformers(tmp_path: Path) -> None:
    """To `WITHIN` in float32. Other layers than the server's are refused by name, and a server that is gone too."""
    model = tmp_path / "llama"
    save_llama(model)
    dataset = prepare_rows(tmp_path / "prepared", model, write_random_rows(tmp_path / "rows.jsonl"))
    settings = CaptureConfig(
        verifier=model, dataset=dataset, output=tmp_path / "captured", layers=LAYERS, mode="float32", window=0,
        top_k=16, shard_tokens=1000, device="cpu", compute_dtype="float32",
    )  # fmt: skip
    capture(settings)
    folder = tmp_path / "states"
    with served(model, LAYERS, folder, tmp_path / "vllm.log") as url:
        summary = capture_from_engine(
            EngineConfig(engine=url, capture=replace(settings, output=tmp_path / "extracted"))
        )
        assert not summary.quarantined
        assert not list(folder.iterdir())
        wrong = replace(settings, layers=(1, 2, 3), output=tmp_path / "wrong")
        with pytest.raises(InputError, match=r"auxiliary state 2: expected the output of block 3 .* found .* block 4"):
            capture_from_engine(EngineConfig(engine=url, capture=wrong))  # negative control
    ours, theirs = StoreReader(tmp_path / "extracted"), StoreReader(settings.output)
    assert len(ours) == len(theirs) == 40
    for number in range(len(ours)):
        found, expected = ours.read(number).arrays, theirs.read(number).arrays
        assert np.array_equal(found["token_ids"], expected["token_ids"])
        assert np.array_equal(found["positions"], expected["positions"])
        assert (found["argmax"] == expected["argmax"]).mean() > 0.99
        for name in (*(f"tap_{layer}" for layer in LAYERS), "log_z_full", "log_z_draft"):
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=WITHIN)
    check = ours.manifest.provenance["self_check"]
    assert all(check[f"recorded_{name}"] < OF_STATES for name in ("tap_1", "tap_2", "tap_4", "last_state"))
    assert not verify_store(tmp_path / "extracted").damages
    with pytest.raises(ServerError, match="start the server with: vllm serve"):
        capture_from_engine(EngineConfig(engine=url, capture=replace(settings, output=tmp_path / "none"), retries=0))
