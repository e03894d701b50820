"""The speculators form before those who read it: the speculators library, and a real vLLM.

Set DRAFTCACHE_SPECULATORS_PYTHON to an interpreter that has speculators (0.9 was read), DRAFTCACHE_VLLM_PYTHON to one
that has vLLM (0.32 on a CPU was run), then `pytest -m slow tests/test_speculators_form.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from draftcache.draft_train.export import export
from draftcache.draft_train.served_report import check_export
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.errors import CheckpointError, InputError
from draftcache.tools.engine_check.drafts import captured, offline_count, trained
from draftcache.tools.engine_check.engine import Engine
from draftcache.tools.engine_check.judging import DRAFTS_COUNTER
from draftcache.tools.engine_check.subjects import llama_subject
from support.synthetic import LAYERS, VOCAB, write_store
from support.training_runs import config

SPECULATORS = os.environ.get("DRAFTCACHE_SPECULATORS_PYTHON", "")
VLLM = os.environ.get("DRAFTCACHE_VLLM_PYTHON", "")
BLOCK = {"num_hidden_layers": 2, "block_size": 4, "ttt_steps": 0}
READ = """
import json, sys
import torch
from speculators import SpeculatorModel, SpeculatorModelConfig
path = sys.argv[1]
config = SpeculatorModelConfig.from_pretrained(path)
from safetensors.torch import load_file
tensors = load_file(path + "/model.safetensors")
model = SpeculatorModel.registered_model_class_from_config(config)(config)
state = model.state_dict()
loaded = model.load_state_dict(tensors, strict=False)
shapes = {name: list(state[name].shape) == list(value.shape) for name, value in tensors.items() if name in state}
form = config.speculators_config
print(json.dumps({
    "class": type(config).__name__, "unexpected": loaded.unexpected_keys, "missing": loaded.missing_keys,
    "shapes": all(shapes.values()), "tokens": form.proposal_methods[0].speculative_tokens,
    "verifier": form.verifier.name_or_path, "algorithm": form.algorithm,
    "theta": config.transformer_layer_config.rope_parameters["rope_theta"],
    "window": config.transformer_layer_config.sliding_window,
    "types": config.transformer_layer_config.layer_types,
    "ids": getattr(config, "eagle_aux_hidden_state_layer_ids", None) or config.aux_hidden_state_layer_ids,
}))
"""
RUNS: dict[str, dict[str, Any]] = {
    "eagle3": {},
    "eagle31": {"eagle31": True},
    "dflash": {"draft": "dflash", **BLOCK},
    "dflash-full": {"draft": "dflash", **BLOCK, "sliding_window": 0},
    "dspark": {"draft": "dspark", **BLOCK},
    "dspark-bonus": {"draft": "dspark", **BLOCK, "anchor": "bonus", "confidence_head": True},
}


def test_what_the_form_can_not_say_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "store", tokens=VOCAB - 1)
    dspark = Trainer(config(tmp_path, epochs=1, draft="dspark", **BLOCK)).run()
    for version in (None, "0.26.0"):
        with pytest.raises(InputError, match=r"--engine-version: expected 0\.27\.0 or later .*--format classic"):
            export(dspark, tmp_path / "draft", engine="vllm", engine_version=version, form="speculators")
    export(dspark, tmp_path / "draft", engine="vllm", engine_version="0.27.0", form="speculators")
    with pytest.raises(InputError, match="--format speculators: expected --engine vllm"):
        export(eagle3(tmp_path), tmp_path / "none", engine="sglang", form="speculators")
    with pytest.raises(InputError, match=r"--format: expected one of \['classic', 'speculators'\], found 'gguf'"):
        export(dspark, tmp_path / "none", engine="vllm", form="gguf")
    sinks = Trainer(
        config(tmp_path, output=tmp_path / "sinks", epochs=1, draft="dspark", attention_sinks=True, **BLOCK)
    ).run()
    with pytest.raises(CheckpointError, match=r"--format speculators: .*found attention sinks; use --format classic"):
        export(sinks, tmp_path / "none", engine="vllm", engine_version="0.32.0", form="speculators")


def eagle3(tmp_path: Path) -> Path:
    return Trainer(config(tmp_path, output=tmp_path / "eagle3", epochs=1)).run()


def test_the_layer_is_inside_and_the_method_beside_it(tmp_path: Path) -> None:
    write_store(tmp_path / "store")
    path = export(eagle3(tmp_path), tmp_path / "draft", engine="vllm", form="speculators", base_model="org/verifier")
    written = json.loads((path / "config.json").read_text())
    layer = written["transformer_layer_config"]
    assert written["speculators_model_type"] == "eagle3"
    assert written["eagle_aux_hidden_state_layer_ids"] == [layer + 1 for layer in LAYERS]
    assert written["norm_before_residual"] is False
    assert (layer["model_type"], layer["num_hidden_layers"], layer["num_aux_hidden_states"]) == ("llama", 1, 3)
    assert (layer["sliding_window"], layer["layer_types"]) == (16, ["sliding_attention"])
    assert layer["rope_parameters"] == {"rope_type": "default", "rope_theta": layer["rope_theta"]}
    form = written["speculators_config"]
    assert form["verifier"] == {"name_or_path": "org/verifier", "architectures": ["None"]}
    assert form["proposal_methods"] == [{"proposal_type": "greedy", "speculative_tokens": 3}]
    assert check_export(path).target.form == "speculators"


@pytest.mark.slow
@pytest.mark.skipif(not SPECULATORS, reason="set DRAFTCACHE_SPECULATORS_PYTHON to an interpreter that has speculators")
@pytest.mark.parametrize("name", RUNS)
def test_speculators_reads_config_and_weights(tmp_path: Path, name: str) -> None:
    write_store(tmp_path / "store", tokens=VOCAB - 1)
    run = Trainer(config(tmp_path, epochs=1, **RUNS[name])).run()
    path = export(run, tmp_path / "draft", engine="vllm", engine_version="0.32.0", form="speculators", dtype="float32")
    ran = subprocess.run([SPECULATORS, "-c", READ, str(path)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["algorithm"] == RUNS[name].get("draft", "eagle3")
    assert found["unexpected"] == []
    # The verifier's own, which speculators takes from the verifier; a draft's weights are all there.
    assert set(found["missing"]) <= {"embed_tokens.weight", "verifier_norm.weight", "verifier_lm_head.weight"}
    assert found["shapes"]
    assert found["ids"] == [layer + 1 for layer in LAYERS]
    assert found["theta"] == 10000.0
    assert (found["window"], set(found["types"])) == (
        (None, {"full_attention"}) if name == "dflash-full" else (16, {"sliding_attention"})
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not VLLM, reason="set DRAFTCACHE_VLLM_PYTHON to an interpreter that has vLLM")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU near-ties part the texts: engine_check judges those")
@pytest.mark.parametrize("name", ["eagle3", "eagle31", "dflash"])
def test_vllm_serves_the_form_with_the_verify_steps_that_eval_counts(tmp_path: Path, name: str) -> None:
    subject = llama_subject(tmp_path / "verifier", 24, steps=180)
    options = {
        "dtype": "float32", "max_model_len": 512, "max_num_seqs": 1, "enforce_eager": True,
        "enable_prefix_caching": False, "disable_log_stats": False,
    }  # fmt: skip
    engine = Engine(VLLM, tmp_path / "engine", options, batched=False)
    asked = (subject.prompts, 60)
    plain = [item["token_ids"] for item in engine.answers("plain", "plain", subject.verifier, *asked)["outputs"]]
    traces = list(zip(subject.prompts, plain, strict=True))
    store = captured(traces, subject, tmp_path / "traces", dtype="float32", device="cpu")
    run = trained(name, subject, store, tmp_path / "run", draft_tokens=5, device="cpu")
    expected = offline_count(run, store, tmp_path / "count.json", draft_tokens=5)
    how: dict[str, Any] = {"engine": "vllm", "dtype": "float32", "verifier": subject.verifier}
    draft = export(run, tmp_path / "draft", form="speculators", base_model=str(subject.verifier), **how)
    # By the draft's name alone: config.json names the verifier, the method and the tokens per step.
    answer = engine.answers("right", "the form", draft, *asked)
    steps = int(answer["counters"][DRAFTS_COUNTER])
    print("verify steps, vLLM and eval:", steps, expected["verify_steps"], "tokens:", expected["tokens"])
    assert [item["token_ids"] for item in answer["outputs"]] == plain
    assert abs(steps - expected["verify_steps"]) <= (0 if name != "dflash" else 0.01 * expected["verify_steps"])
    assert steps < 0.8 * expected["tokens"]
    # Negative control: the traps of this form cost steps silently.
    written = json.loads((draft / "config.json").read_text())
    if name == "eagle31":
        written["norm_output"] = False
    else:
        ids = "aux_hidden_state_layer_ids" if name == "dflash" else "eagle_aux_hidden_state_layer_ids"
        written[ids] = [1, 2, 4]
    (draft / "config.json").write_text(json.dumps(written))
    assert check_export(draft).errors or name == "eagle31"
    wrong = engine.answers("wrong", "a wrong form", draft, *asked)
    assert int(wrong["counters"][DRAFTS_COUNTER]) > 1.03 * steps
