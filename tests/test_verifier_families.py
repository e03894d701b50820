"""Families of verifiers end to end: tiny models, real captures, and a check by plain transformers that can fail."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from draftcache.tools.bench.parts.verifier_tables import families_table, outcome_table, summary_line
from draftcache.tools.bench.parts.verifier_trial import Trial

EXPECTED = {
    "llama": "works",
    "gemma2": "works",
    "gemma3_text": "works",
    "mixtral": "works",
    "phi3": "works",
    "gpt2": "works",
    "mamba2": "works",
    "nemotron_h": "works",
    "granite": "works",
    "falcon_h1": "works",
    "qwen3_next": "works",
    "deepseek_v3": "works",
    "electra": "works",
}
"""What becomes of each type. A family that can't be captured would be named here with its outcome."""

CONTROLS = """
import json, shutil, sys, time
from pathlib import Path

from safetensors.torch import load_file, save_file

from draftcache.tools.bench import verifiers
from draftcache.tools.bench.parts import verifier_trial
from draftcache.tools.bench.parts.forked import Limits
from draftcache.tools.bench.parts.tiny_verifiers import save_tiny_model

root = Path(sys.argv.pop(1)) / "controls"
verifiers.main()
model = root.with_name("llama")
save_tiny_model("llama", model)
root.mkdir()
dataset = verifier_trial.write_dataset(root / "prepared")
limits = Limits(seconds=60, memory_gb=6)
verifier_trial._build = lambda _type, path: 0 if shutil.copytree(model, path) else 1  # once for all


def change(model):
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 1.02
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


changed = verifier_trial.try_type("llama", dataset, root / "changed", limits, change)
verifier_trial.command_line = lambda arguments: 1 / 0
crashing = verifier_trial.try_type("llama", dataset, root / "crashing", limits)
verifier_trial.command_line = lambda arguments: time.sleep(600)
hanging = verifier_trial.try_type("llama", dataset, root / "hanging", Limits(seconds=2, memory_gb=6))
names = {"changed": changed, "crashing": crashing, "hanging": hanging}
(root / "trials.json").write_text(json.dumps({name: trial.as_json() for name, trial in names.items()}))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the benchmark's rows.json and details.json of EXPECTED, then the results of CONTROLS."""
    root = tmp_path_factory.mktemp("verifiers")
    command = [sys.executable, "-c", CONTROLS, str(root), "--only", ",".join(EXPECTED)]
    files = ["--output", str(root / "rows.json"), "--details", str(root / "details.json")]
    done = subprocess.run([*command, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return root


def test_families_have_the_expected_outcome(found: Path) -> None:
    rows, trials = (json.loads((found / name).read_text()) for name in ("rows.json", "details.json"))
    outcomes = {trial["model_type"]: trial["outcome"] for trial in trials}
    assert outcomes == EXPECTED, [(trial["model_type"], trial["reason"]) for trial in trials]
    works = [row for row in rows if row["metric"] == "works" and row["case"] != "summary"]
    assert {row["case"]: row["value"] for row in works} == {
        name: float(outcome == "works") for name, outcome in EXPECTED.items()
    }
    counts = {row["metric"]: row["value"] for row in rows if row["case"] == "summary"}
    assert counts["share"] == pytest.approx(list(EXPECTED.values()).count("works") / len(EXPECTED))
    assert sum(counts[name] for name in ("works", "refused", "failed", "wrong", "unbuildable")) == len(EXPECTED)


def test_a_store_of_other_weights_is_wrong_and_a_crash_or_hang_is_a_failure(found: Path) -> None:
    """The negative controls: one weight of block 1 is changed by 2 % after the capture."""
    trials = json.loads((found / "controls" / "trials.json").read_text())
    assert trials["changed"]["outcome"] == "wrong"
    assert "tap_2" in trials["changed"]["reason"]
    assert "log_z_full" in trials["changed"]["reason"]
    assert "tap_0" not in trials["changed"]["reason"]  # block 0 is before the changed weight
    assert trials["crashing"]["outcome"] == "failed"
    assert "ZeroDivisionError" in trials["crashing"]["reason"]
    assert trials["hanging"]["outcome"] == "failed"
    waited = re.search(r"not finished after (\d+) s", trials["hanging"]["reason"])
    assert waited is not None
    assert int(waited[1]) >= 2  # the limit; on a busy machine it is noticed later
    assert sorted(path.name for path in (found / "controls").iterdir()) == ["prepared", "trials.json"]


def test_tables_name_every_type_and_count_the_share_of_what_was_built() -> None:
    trials = [
        Trial("llama", "llama", "LlamaForCausalLM", "works"),
        Trial("exaone", "llama", "LlamaForCausalLM", "wrong", "tap_1 0.5"),
        Trial("xlm", "xlm", "XLMWithLMHeadModel", "refused", "no final norm"),
        Trial("rare", "rare", "RareForCausalLM", "unbuildable", "no sizes"),
    ]
    assert summary_line(trials) == (
        "4 types: 1 works, 1 refused, 0 failed, 1 wrong, 1 unbuildable; 33.3% of the 3 that were built work"
    )
    assert "exaone: tap_1 0.5" in outcome_table(trials)
    table = families_table(trials).splitlines()
    assert "| works | 1 | llama (llama) |" in table
    assert "| wrong | 1 | llama (exaone) |" in table
    assert "| refused | 1 | xlm |" in table
