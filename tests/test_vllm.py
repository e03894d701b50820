"""Against a real vLLM: hidden states by its own ids, and exported drafts that it serves, by `engine_check`.

Set DRAFTCACHE_VLLM_PYTHON to an interpreter that has vLLM (0.32 on a CPU was run), then `pytest -m slow
tests/test_vllm.py`. NemotronH is probed only: that build's speculative decoding changes its text.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, NemotronHConfig, NemotronHForCausalLM, set_seed

from draftcache.tools.demo.pipeline import VERIFIER
from draftcache.tools.engine_check import states
from draftcache.tools.engine_check.__main__ import main
from draftcache.tools.engine_check.engine import Engine
from draftcache.tools.engine_check.subjects import LLAMA_VOCABULARY, save_llama
from draftcache.tools.probe.compare import compare_files
from draftcache.tools.probe.dump import ProbeConfig, dump_states

PYTHON = os.environ.get("DRAFTCACHE_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not PYTHON, reason="set DRAFTCACHE_VLLM_PYTHON to an interpreter that has vLLM"),
]
LAYERS, IDS = (1, 2, 4), (2, 3, 5)
OPTIONS: dict[str, Any] = {
    "max_model_len": 512, "max_num_seqs": 1, "enforce_eager": True, "enable_prefix_caching": False,
    "disable_log_stats": False,
}  # fmt: skip


def save_nemotron(path: Path, seed: int = 0) -> None:
    """Random weights in widths that vLLM takes, without routed experts, which its CPU build lacks."""
    set_seed(seed)
    config = NemotronHConfig(
        hybrid_override_pattern="M-M*-M-", vocab_size=LLAMA_VOCABULARY, hidden_size=128, intermediate_size=256,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=512, initializer_range=0.08,
        mamba_num_heads=4, mamba_head_dim=64, ssm_state_size=32, n_groups=2, chunk_size=128, bos_token_id=0,
        eos_token_id=1, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    NemotronHForCausalLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(VERIFIER).save_pretrained(path)


@pytest.mark.parametrize("save", [save_llama, save_nemotron])
def test_hidden_states_are_those_of_vllms_ids(tmp_path: Path, save: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, where they agree to 1e-4; `engine_check` compares them in bfloat16."""
    save(tmp_path / "model")
    save(tmp_path / "other", seed=1)
    engine = Engine(PYTHON, tmp_path / "engine", OPTIONS | {"dtype": "float32"}, batched=False)
    monkeypatch.setattr(states, "DTYPE", "float32")
    monkeypatch.setattr(states, "TOLERANCE", 1e-4)
    monkeypatch.setattr(states, "ROUNDING", 0.0)
    verdict = states.check_states(engine, tmp_path / "model", LAYERS, tmp_path, device="cpu", reference="float32")
    assert verdict.passed, verdict.found
    written = Path(json.loads((tmp_path / "engine" / "states.json").read_text())["outputs"][0]["hidden_states"])
    other = tmp_path / "other.safetensors"
    dump_states(
        ProbeConfig(verifier=tmp_path / "other", output=other, layers=LAYERS, compute_dtype="float32", device="cpu")
    )
    assert not compare_files(other, written, ids=IDS).fits  # negative control


def test_vllm_serves_drafts_with_the_verify_steps_that_eval_counts(tmp_path: Path) -> None:
    """Exactly for Eagle3. A block's queries go through the CPU's attention of several rows, which rounds more coarsely.

    These few texts are learnt by heart, which makes the weights large and that rounding visible: 2 % of DFlash's verify
    steps, where the 208 texts of the whole check differ by 0.06 %.
    """
    drafts = ("eagle3", "eagle31", "dflash", "dflash-full")
    words = ["--vllm", PYTHON, "--work", str(tmp_path / "work"), "--prompts", "24", "--tokens", "60"]
    rows_file = tmp_path / "rows.json"
    checks = "text,steps,proposals,wrong"
    main([*words, "--drafts", ",".join(drafts), "--checks", checks, "--output", str(rows_file)])
    rows = {(row["case"], row["metric"]): row["value"] for row in json.loads(rows_file.read_text())}
    for draft in drafts:
        exact = draft.startswith("eagle3")
        passed = ("text", "steps", "proposals", "wrong") if exact else ("text", "wrong")
        assert all(rows[draft, f"{check}_passed"] == 1 for check in passed), draft
        assert rows[draft, "proposals_equal"] >= (1 if exact else 0.9), draft
        assert rows[draft, "proposals_equal_above_margin"] >= (1 if exact else 0.97), draft
        assert rows[draft, "verify_steps_apart"] <= (0 if exact else 0.04), draft
        assert rows[draft, "acceptance_length"] > 1.25  # drafts are accepted, so that the equality says something
        assert rows[draft, "wrong_export_cost"] > 0.1, draft
