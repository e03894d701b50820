"""README.md of an export: recipe, hashes, acceptance by bucket, serve command, and the licence that somebody named."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from draftcache.draft_train.checkpoint import load_state
from draftcache.draft_train.drafts.served_parts import serve_command
from draftcache.draft_train.drafts.serving_target import ServingTarget
from draftcache.draft_train.export import FILES, export
from draftcache.draft_train.licence import verifier_licence
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.checkout import code_commit, code_version
from draftcache.store.common.errors import InputError
from draftcache.tools.cli import main
from support.synthetic import LAYERS, write_store
from support.training_runs import config, rewrite_state


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an evaluation beside its checkpoints."""
    root = tmp_path_factory.mktemp("run")
    write_store(root / "store")
    Trainer(config(root, epochs=1)).run()
    words = ["--store", str(root / "store"), "--checkpoint", str(root / "run"), "--splits", "train,val"]
    buckets = ["--length-buckets", "8,16", "--draft-tokens", "3", "--device", "cpu"]
    assert main(["eval", *words, *buckets, "--output", str(root / "run" / "evaluation.json")]) == 0
    return root / "run"


def card_of(path: Path) -> tuple[dict[str, Any], str]:
    """The front matter and the text of an export's README.md."""
    _, front, text = (path / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_tells_what_the_checkpoint_and_the_files_hold(run: Path, tmp_path: Path) -> None:
    path = export(run, tmp_path / "draft", engine="vllm", base_model="org/verifier")
    assert sorted(item.name for item in path.iterdir()) == sorted(FILES)
    front, text = card_of(path)
    state = load_state(run / "checkpoints" / "step_00000002")
    assert front["base_model"] == "org/verifier"
    assert {"speculative-decoding", "eagle3", "vllm"} <= set(front["tags"])
    settings = '{"method": "eagle3", "model": "DRAFT", "num_speculative_tokens": 3}'
    assert f"vllm serve org/verifier --speculative-config '{settings}'" in text
    for name, value in (
        ("optimizer steps", 2), ("store (xxh3-128)", state.store_hash), ("learning_rate", 0.01), ("sliding_window", 16),
        ("vocabulary map (xxh3-128)", state.draft_vocab_hash), ("verifier weights (xxh3-128)", "0" * 32),
        ("outputs of blocks, from 0", ", ".join(map(str, LAYERS))),
        ("draftcache", f"{code_version()} (commit {code_commit()})"),
    ):  # fmt: skip
        assert f"| {name} | {value} |" in text
    for name in ("config.json", "model.safetensors"):
        data = (path / name).read_bytes()
        assert f"| {name} | {len(data):,} | {hashlib.sha256(data).hexdigest()} |" in text


def test_acceptance_stands_by_split_and_bucket(run: Path, tmp_path: Path) -> None:
    _, text = card_of(export(run, tmp_path / "draft", engine="vllm"))
    body = json.loads((run / "evaluation.json").read_text())
    for split, found in body["splits"].items():
        draft = found["draft"]
        assert re.search(rf"\| {split} \| all \| .* \| {draft['acceptance_length']:.3f} \|", text)
        rows = draft["by_position"]
        assert [row["from"] for row in rows] == [0, 8, 16]
        assert f"| {split} | 0 to 7 | {rows[0]['conversations']} | {rows[0]['verify_steps']} | " in text
        assert re.search(rf"\| {split} \| 16 on \| .* \| {rows[2]['acceptance_length']:.3f} \|", text)


def test_only_evaluations_of_this_checkpoint_count(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    other = json.loads((copy / "evaluation.json").read_text()) | {"step": 1}
    (copy / "evaluation.json").write_text(json.dumps(other))
    _, text = card_of(export(copy, tmp_path / "none", engine="vllm"))
    assert "No evaluation was at hand" in text
    with pytest.raises(
        InputError, match=r"--evaluations .*expected an evaluation of step_00000002, step 2, found one of"
    ):
        export(copy, tmp_path / "other", engine="vllm", evaluations=[copy / "evaluation.json"])
    with pytest.raises(InputError, match="expected a file of `draftcache eval --output`"):
        export(copy, tmp_path / "other", engine="vllm", evaluations=[copy / "run.json"])
    given = export(copy, tmp_path / "given", engine="vllm", evaluations=[run / "evaluation.json"])
    assert "| train | all |" in card_of(given)[1]


def test_the_same_checkpoint_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    for form in ("classic", "speculators"):
        places = (tmp_path / "a" / form, tmp_path / "b" / form)
        for place in places:
            place.parent.mkdir(exist_ok=True)
            export(run, place, engine="vllm", form=form)
        one, two = ({item.name: item.read_bytes() for item in place.iterdir()} for place in places)
        assert one == two
        assert str(tmp_path).encode() not in one["README.md"] + one["config.json"]
    shutil.copytree(run, tmp_path / "moved")
    moved = export(tmp_path / "moved", tmp_path / "another name", engine="vllm", form="speculators")
    assert {item.name: item.read_bytes() for item in moved.iterdir()} == one


def test_a_checkpoint_of_an_earlier_version_names_no_commit(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    rewrite_state(copy / "checkpoints" / "step_00000002", lambda body: body.pop("code"))
    assert "| draftcache | unknown (commit unknown) |" in card_of(export(copy, tmp_path / "old", engine="vllm"))[1]


APACHE = "                                 Apache License\n                           Version 2.0, January 2004\n"


@pytest.mark.parametrize(
    ("files", "name", "said"),
    [
        (
            {"README.md": "---\nlicense: llama3.1\ntags: [a]\n---\n# A model\n"},
            "llama3.1",
            "README.md names its licence",
        ),
        ({"config.json": '{"license": "cc-by-4.0"}'}, "cc-by-4.0", "config.json names its licence"),
        ({"LICENSE": APACHE}, "apache-2.0", "is the text of Apache License Version 2.0"),
        ({"LICENSE": "MIT License\n\nCopyright"}, "mit", "is the text of MIT License"),
        ({"LICENSE": "Open Model Agreement\n"}, None, "begins with “Open Model Agreement”: read it"),
        ({"README.md": "---\nlicense: [\n---\n", "config.json": "no JSON"}, None, "No file of the verifier names"),
        ({"README.md": "# no front matter\nlicense: mit\n"}, None, "No file of the verifier names"),
        (None, None, "were not at hand: look its licence up"),
    ],
)
def test_a_licence_is_named_by_a_file_or_not_at_all(
    tmp_path: Path, files: dict[str, str] | None, name: str | None, said: str
) -> None:
    for file, text in (files or {}).items():
        (tmp_path / file).write_text(text)
    found = verifier_licence(tmp_path if files else None)
    assert found.name == name
    assert said in found.source


def test_the_cards_licence_is_the_verifiers(run: Path, tmp_path: Path) -> None:
    front, text = card_of(export(run, tmp_path / "none", engine="vllm"))
    assert "license" not in front
    assert "look its licence up before you publish" in text
    verifier = tmp_path / "verifier"
    verifier.mkdir()
    (verifier / "config.json").write_text(json.dumps({"hidden_size": 8, "vocab_size": 40, "num_hidden_layers": 6}))
    (verifier / "LICENSE").write_text(APACHE)
    front, text = card_of(export(run, tmp_path / "named", engine="vllm", verifier=verifier))
    assert front["license"] == "apache-2.0"
    assert "The verifier's LICENSE is the text of Apache License Version 2.0." in text


def test_sglang_is_served_by_its_own_command(run: Path, tmp_path: Path) -> None:
    _, text = card_of(export(run, tmp_path / "draft", engine="sglang", engine_version="0.5.23"))
    assert "--speculative-algorithm EAGLE3 --speculative-draft-model-path DRAFT" in text
    assert "--speculative-num-steps 3 --speculative-eagle-topk 1 --speculative-num-draft-tokens 4" in text
    assert "for sglang 0.5.23" in text
    assert "--speculative-num-draft-tokens 4 \\\n  --speculative-draft-window-size 15\n```" in text  # of 16
    assert "window" not in serve_command("eagle3", ServingTarget(engine="sglang"), "V", "D", 3)
