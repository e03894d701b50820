"""Hidden states that a real vLLM extracts, imported as a store.

Set DRAFTCACHE_VLLM_PYTHON to an interpreter that has vLLM (0.32 on a CPU was run), then `pytest -m slow
tests/test_peers_vllm.py`.
"""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.worker_job import CaptureJob
from draftcache.capture.peers.config import ImportConfig
from draftcache.capture.peers.job import run_import
from draftcache.store.common.errors import InputError
from draftcache.store.reader import StoreReader
from draftcache.tools.engine_check.engine import Engine
from draftcache.tools.engine_check.states import extraction_options
from draftcache.tools.engine_check.subjects import LLAMA_VOCABULARY, save_llama

PYTHON = os.environ.get("DRAFTCACHE_VLLM_PYTHON", "")
LAYERS, LAST = (1, 2, 4), 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not PYTHON, reason="set DRAFTCACHE_VLLM_PYTHON to an interpreter that has vLLM")
def test_states_that_vllm_extracts_become_the_store_that_a_capture_is(tmp_path: Path) -> None:
    """Taps within float32 rounding of another order of sums; the same teacher choices, to rounding."""
    model = tmp_path / "llama"
    save_llama(model)
    draw = random.Random(0)
    prompts = [[draw.randrange(3, LLAMA_VOCABULARY) for _ in range(draw.randrange(40, 90))] for _ in range(6)]
    options: dict[str, Any] = {
        "dtype": "float32", "max_model_len": 512, "max_num_seqs": 1, "enforce_eager": True,
        "enable_prefix_caching": False, "disable_log_stats": False,
    }  # fmt: skip
    engine = Engine(PYTHON, tmp_path / "engine", options | extraction_options((*LAYERS, LAST), tmp_path / "states"))
    answer = engine.answers("states", "extracting", model, prompts, 1)
    (tmp_path / "files").mkdir()
    for number, output in enumerate(answer["outputs"]):
        Path(output["hidden_states"]).rename(tmp_path / "files" / f"hs_{number}.safetensors")
    kept: dict[str, Any] = {"layers": LAYERS, "mode": "float32", "window": 0}
    capture = CaptureConfig(
        verifier=model, dataset=tmp_path / "prepared", output=tmp_path / "imported", top_k=16, **kept
    )
    settings = ImportConfig(
        peer="speculators", source=tmp_path / "files", capture=capture, tokenizer=model, draft_vocab_size=600,
        masks="all",
    )  # fmt: skip
    summary = run_import(settings, tmp_path / "work", progress=False)
    assert summary.findings["last_state"] == "before"
    assert not summary.set_aside
    CaptureJob(replace(capture, output=tmp_path / "captured", compute_dtype="float32", device="cpu")).run()
    ours, theirs = StoreReader(tmp_path / "imported"), StoreReader(tmp_path / "captured")
    assert len(ours) == len(theirs) == 6
    for number in range(6):
        found, expected = ours.read(number).arrays, theirs.read(number).arrays
        assert np.array_equal(found["positions"], expected["positions"])
        assert np.array_equal(found["argmax"], expected["argmax"])
        for layer in LAYERS:
            np.testing.assert_allclose(found[f"tap_{layer}"], expected[f"tap_{layer}"], rtol=0, atol=1e-4)
        np.testing.assert_allclose(found["log_z_full"], expected["log_z_full"], rtol=0, atol=1e-4)
    wrong = replace(settings, capture=replace(capture, layers=(1, 2, 3), output=tmp_path / "wrong"))
    with pytest.raises(InputError, match="auxiliary state 2: expected the output of block 3"):  # negative control
        run_import(wrong, tmp_path / "wrong-work", progress=False)
