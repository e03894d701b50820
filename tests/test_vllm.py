"""Against a real vLLM: hidden states by its own ids, and an exported draft that it serves.

Set DRAFTCACHE_VLLM_PYTHON to an interpreter that has vLLM (0.32 on a CPU was run), then `pytest -m slow
tests/test_vllm.py`. NemotronH is probed only: that build's speculative decoding changes its text.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, NemotronHConfig, NemotronHForCausalLM, set_seed

from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.worker_job import CaptureJob
from draftcache.capture.prepare.job import PrepareConfig, prepare
from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.evaluate import evaluate
from draftcache.draft_train.export import export
from draftcache.draft_train.trainer import Trainer
from draftcache.tools.demo.pipeline import VERIFIER
from draftcache.tools.probe.compare import compare_files
from draftcache.tools.probe.dump import ProbeConfig, dump_states

PYTHON = os.environ.get("DRAFTCACHE_VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not PYTHON, reason="set DRAFTCACHE_VLLM_PYTHON to an interpreter that has vLLM"),
]
VOCAB, LAYERS, IDS = 4096, (1, 2, 4), [2, 3, 5]
ANSWER = 60
ENGINE = Path(__file__).parent / "support" / "vllm_engine.py"


def save_verifier(path: Path, kind: str, seed: int = 0) -> Path:
    """Random weights in widths that vLLM takes; NemotronH without routed experts, which its CPU build lacks."""
    set_seed(seed)
    shared: dict[str, Any] = {
        "vocab_size": VOCAB, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "initializer_range": 0.08,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    if kind == "llama":
        model: Any = LlamaForCausalLM(LlamaConfig(num_hidden_layers=6, **shared))
    else:
        mamba = {"mamba_num_heads": 4, "mamba_head_dim": 64, "ssm_state_size": 32, "n_groups": 2, "chunk_size": 128}
        model = NemotronHForCausalLM(NemotronHConfig(hybrid_override_pattern="M-M*-M-", **mamba, **shared))
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(VERIFIER).save_pretrained(path)
    return path


def vllm(root: Path, model: Path, prompts: list[list[int]], max_tokens: int, **options: Any) -> dict[str, Any]:
    request, result = root / "request.json", root / "result.json"
    asked = {"model": str(model), "prompts": prompts, "max_tokens": max_tokens, "options": options}
    request.write_text(json.dumps(asked))
    ran = subprocess.run([PYTHON, ENGINE, request, result], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    found: dict[str, Any] = json.loads(result.read_text())
    return found


@pytest.mark.parametrize("kind", ["llama", "nemotron_h"])
def test_probe_names_vllms_ids(tmp_path: Path, kind: str) -> None:
    model = save_verifier(tmp_path / kind, kind)
    for name, path in (("ours", model), ("other", save_verifier(tmp_path / "other", kind, seed=1))):
        settings = ProbeConfig(
            verifier=path, output=tmp_path / f"{name}.safetensors", layers=LAYERS, compute_dtype="float32", device="cpu"
        )
        dump_states(settings)
    states = {"shared_storage_path": str(tmp_path / "states")}
    answer = vllm(
        tmp_path,
        model,
        [load_file(tmp_path / "ours.safetensors")["token_ids"].tolist()],
        1,
        enable_chunked_prefill=False,
        speculative_config={
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": IDS}},
        },
        kv_transfer_config={
            "kv_connector": "ExampleHiddenStatesConnector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": states,
        },
    )
    written = Path(answer["outputs"][0]["hidden_states"])
    found = compare_files(tmp_path / "ours.safetensors", written, ids=tuple(IDS), tolerance=1e-4)
    assert found.fits, found.verdict
    assert found.taps == dict(zip(LAYERS, IDS, strict=True))
    assert not compare_files(tmp_path / "other.safetensors", written, ids=tuple(IDS)).fits  # negative control


DRAFTS: dict[str, dict[str, Any]] = {
    "eagle3": {},
    "eagle31": {"eagle31": True},
    "dflash": {"draft": "dflash", "num_hidden_layers": 2, "block_size": 6},
    "dflash-full": {"draft": "dflash", "num_hidden_layers": 2, "block_size": 6, "sliding_window": 0},
}
"""By name, settings of drafts that this vLLM serves on a CPU; DSpark needs a GPU."""


def method_of(name: str) -> str:
    """vLLM's name of the way in which it serves this draft."""
    return str(DRAFTS[name].get("draft", "eagle3"))


@pytest.mark.parametrize("name", DRAFTS)
def test_vllm_serves_the_export_with_the_verify_steps_that_eval_counts(tmp_path: Path, name: str) -> None:
    model = save_verifier(tmp_path / "llama", "llama")
    draw = random.Random(0)
    prompts = [[draw.randrange(3, VOCAB) for _ in range(draw.randrange(10, 60))] for _ in range(24)]
    plain = [item["token_ids"] for item in vllm(tmp_path, model, prompts, ANSWER)["outputs"]]
    rows = tmp_path / "traces.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"token_ids": prompt + text, "loss_mask": [0] * len(prompt) + [1] * len(text)}) + "\n"
            for prompt, text in zip(prompts, plain, strict=True)
        )
    )
    prepared = PrepareConfig(
        tokenizer=model, output=tmp_path / "prepared", splits={"traces": [rows]}, held_out={}, draft_vocab_size=600,
        workers=1, progress=False,
    )  # fmt: skip
    prepare(prepared)
    captured = CaptureConfig(
        verifier=model, dataset=tmp_path / "prepared", output=tmp_path / "store", layers=LAYERS, mode="float32",
        window=0, device="cpu",
    )  # fmt: skip
    CaptureJob(captured).run()
    values: dict[str, Any] = {
        "store": tmp_path / "store", "output": tmp_path / "run", "splits": ("traces",), "epochs": 60,
        "batch_conversations": 8, "learning_rate": 3e-3, "sliding_window": 24, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "device": "cpu",
    }  # fmt: skip
    Trainer(TrainConfig(**values | DRAFTS[name])).run()
    counted = evaluate(store=tmp_path / "store", checkpoint=tmp_path / "run", splits=["traces"])
    expected = counted["splits"]["traces"]["draft"]
    assert expected["kind"] == "exact"
    draft = export(tmp_path / "run", tmp_path / "draft", engine="vllm", dtype="float32")

    def served() -> tuple[list[list[int]], int]:
        speculative = {"method": method_of(name), "model": str(draft), "num_speculative_tokens": 5}
        answer = vllm(tmp_path, model, prompts, ANSWER, speculative_config=speculative)
        drafts = int(answer["counters"]["vllm:spec_decode_num_drafts"])
        return [item["token_ids"] for item in answer["outputs"]], drafts

    text, steps = served()
    print("verify steps, vLLM and eval:", steps, expected["verify_steps"], "tokens:", expected["tokens"])
    assert text == plain
    # A block's queries go through the CPU's attention of several rows: 4 of 24 texts took one step more or less.
    allowed = 0 if method_of(name) == "eagle3" else 0.01 * expected["verify_steps"]
    assert abs(steps - expected["verify_steps"]) <= allowed
    assert steps < 0.8 * expected["tokens"]  # drafts are accepted, so that the equality says something
    # Negative control: tap ids that are off by one, or an un-normed state that is carried on, cost steps silently.
    config = json.loads((draft / "config.json").read_text())
    if name == "eagle31":
        config["norm_output"] = False
    elif name == "eagle3":
        config["eagle_aux_hidden_state_layer_ids"] = list(LAYERS)
    else:
        config["dflash_config"]["target_layer_ids"] = [layer - 1 for layer in LAYERS]
    (draft / "config.json").write_text(json.dumps(config))
    text, wrong = served()
    assert text == plain
    assert wrong > (1.03 if name == "eagle31" else 1.1) * steps
