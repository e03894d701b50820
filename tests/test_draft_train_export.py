"""The exported form, and every incomplete or mismatched checkpoint refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from draftcache.draft_train.checkpoint import load_state
from draftcache.draft_train.drafts.serving_target import ServingTarget, VerifierFacts, eagle3_ids
from draftcache.draft_train.export import FILES, export, served_positions
from draftcache.draft_train.served_report import check_export
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.errors import CheckpointError, InputError
from draftcache.tools.cli import main
from support.processes import wait_for
from support.synthetic import LAYERS, manifest, vocab_map, write_store
from support.training_runs import config, rewrite_state


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write_store(tmp_path / "store")
    return Trainer(config(tmp_path, epochs=1)).run()


def test_export_holds_what_engines_load(checkpoint: Path, tmp_path: Path) -> None:
    path = export(checkpoint, tmp_path / "draft", engine="vllm", dtype="float32")
    written = json.loads((path / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLMEagle3"]
    assert written["eagle_aux_hidden_state_layer_ids"] == [layer + 1 for layer in LAYERS]
    assert written["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [layer + 1 for layer in LAYERS]
    assert written["sliding_window"] == 16
    assert written["layer_types"] == ["sliding_attention"]
    assert written["norm_before_residual"] is False
    assert (written["fc_norm"], written["norm_output"]) == (False, False)
    tensors = load_file(path / "model.safetensors")
    trained = load_file(checkpoint / "model.safetensors")
    assert set(tensors) == set(trained) | {"d2t", "t2d"}
    assert all(torch.equal(tensors[name], trained[name]) for name in trained)
    assert "embed_tokens.weight" not in tensors
    ids = tensors["d2t"] + torch.arange(len(tensors["d2t"]))
    np.testing.assert_array_equal(ids.numpy(), vocab_map().target_ids)
    assert tensors["t2d"].dtype == torch.bool


def test_eagle31_is_in_the_config_and_its_norms_are_in_the_tensors(tmp_path: Path) -> None:
    write_store(tmp_path / "store")
    path = export(Trainer(config(tmp_path, epochs=1, eagle31=True)).run(), tmp_path / "draft", engine="vllm")
    written = json.loads((path / "config.json").read_text())
    assert (written["fc_norm"], written["norm_output"]) == (True, True)
    norms = {name for name in load_file(path / "model.safetensors") if name.startswith("fc_norm.")}
    assert norms == {f"fc_norm.{number}.weight" for number in range(len(LAYERS))}


def test_a_checkpoint_of_the_other_kind_is_no_warm_start(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="draft fc_norm"):
        Trainer(replace(config(tmp_path, eagle31=True, init_from=checkpoint), output=tmp_path / "second")).run()
    with pytest.raises(CheckpointError, match=r"draft fc_norm is False, here it is True.*--eagle31"):
        Trainer(config(tmp_path, epochs=1, eagle31=True)).run()


LLAMA = VerifierFacts(model_type="llama", layers=52)


def test_aux_ids_follow_the_engine() -> None:
    blocks = [2, 26, 48]
    assert eagle3_ids(blocks, ServingTarget(engine="vllm"), LLAMA) == [3, 27, 49]
    assert eagle3_ids(blocks, ServingTarget(engine="sglang"), LLAMA) == [2, 26, 48]
    with pytest.raises(InputError, match="--engine: expected vllm or sglang, found 'other'"):
        eagle3_ids(blocks, ServingTarget(engine="other"), LLAMA)


@pytest.mark.parametrize(
    ("version", "ids"),
    [
        ("0.5.12", [2, 26, 48]),
        ("0.5.12.post1", [2, 26, 48]),
        ("0.5.13rc0", [2, 26, 48]),
        ("0.5.13", [3, 27, 49]),
        ("0.5.23", [3, 27, 49]),
    ],
)
def test_sglang_changed_the_ids_beside_deepseek_and_its_version_is_not_guessed(version: str, ids: list[int]) -> None:
    deepseek, blocks = VerifierFacts(model_type="deepseek_v3"), [2, 26, 48]
    assert eagle3_ids(blocks, ServingTarget(engine="sglang", version=version), deepseek) == ids
    assert eagle3_ids(blocks, ServingTarget(engine="sglang", version=version), LLAMA) == blocks  # not beside others
    assert eagle3_ids(blocks, ServingTarget(engine="vllm", version=version), deepseek) == [3, 27, 49]
    choices = r"older than 0\.5\.13 \(\[2, 26, 48\]\), or 0\.5\.13 or later \(\[3, 27, 49\]\)"
    with pytest.raises(InputError, match=f"--engine-version: .*{choices}"):
        eagle3_ids(blocks, ServingTarget(engine="sglang"), deepseek)
    with pytest.raises(InputError, match="expected taps from block 1 on"):
        eagle3_ids([0, 2], ServingTarget(engine="sglang", version="0.5.13"), deepseek)
    assert eagle3_ids([1, 2], ServingTarget(engine="sglang", version="0.5.13"), deepseek) == [2, 3]


def test_an_export_beside_deepseek_names_the_version(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_store(tmp_path / "store", verifier=manifest().verifier | {"model_type": "deepseek_v3"})
    last = Trainer(config(tmp_path, epochs=1)).run()
    words = ["export", "--checkpoint", str(last), "--engine", "sglang", "--output"]
    assert main([*words, str(tmp_path / "none")]) == 2
    said = capsys.readouterr().err
    assert "--engine-version" in said
    assert "older than 0.5.13 ([1, 3, 4])" in said
    assert "0.5.13 or later ([2, 4, 5])" in said
    for version, ids in (("0.5.12", list(LAYERS)), ("0.5.13", [layer + 1 for layer in LAYERS])):
        draft = tmp_path / version
        assert main([*words, str(draft), "--engine-version", version]) == 0
        written = json.loads((draft / "config.json").read_text())
        assert written["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == ids
        assert written["draftcache"]["engine_version"] == version
        assert main(["export", "--check", str(draft)]) == 0
        other = {"0.5.12": "0.5.13", "0.5.13": "0.5.12"}[version]
        capsys.readouterr()
        assert main(["export", "--check", str(draft), "--engine", "sglang", "--engine-version", other]) == 1
        assert "aux-ids-off-by-one" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"--engine-version: expected a version such as 0\.5\.13, found 'new'"):
        export(last, tmp_path / "none", engine="sglang", engine_version="new")


NEMOTRON = {"model_type": "nemotron_h", "architecture": "NemotronHForCausalLM", "name": "/models/cascade"}


@pytest.mark.parametrize("left_out", [None, "model_type", "architecture"])
def test_sglang_does_not_serve_an_eagle3_draft_of_a_nemotron_h(
    tmp_path: Path, left_out: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    verifier = NEMOTRON if left_out is None else NEMOTRON | {left_out: "other"}
    write_store(tmp_path / "store", verifier=manifest().verifier | verifier)
    last, draft = Trainer(config(tmp_path, epochs=1)).run(), tmp_path / "draft"
    words = ["export", "--checkpoint", str(last), "--output", str(draft), "--engine"]
    assert main([*words, "sglang"]) == 2
    said = capsys.readouterr().err
    for part in ("serves the draft of /models/cascade, found sglang", "--engine vllm", "--draft dflash", "--force"):
        assert part in said
    assert not draft.exists()
    assert main([*words, "sglang", "--force"]) == 0
    assert "export: warning: sglang is known not to serve the draft of /models/cascade" in capsys.readouterr().err
    written = json.loads((draft / "config.json").read_text())
    assert written["eagle_aux_hidden_state_layer_ids"] == list(LAYERS)
    shutil.rmtree(draft)
    assert main([*words, "vllm"]) == 0
    assert "warning" not in capsys.readouterr().err


def test_force_is_refused_where_nothing_is_to_be_forced(checkpoint: Path, tmp_path: Path) -> None:
    for engine in ("vllm", "sglang"):
        with pytest.raises(InputError, match=f"--force: .*found --engine {engine}, of which nothing is known"):
            export(checkpoint, tmp_path / "draft", engine=engine, force=True)
    export(checkpoint, tmp_path / "draft", engine="sglang")


def test_full_attention_draft_says_so(tmp_path: Path) -> None:
    write_store(tmp_path / "store")
    last = Trainer(config(tmp_path, epochs=1, sliding_window=0)).run()
    written = json.loads((export(last, tmp_path / "draft", engine="vllm") / "config.json").read_text())
    assert written["sliding_window"] is None
    assert written["layer_types"] == ["full_attention"]


@pytest.mark.parametrize("missing", ["lm_head.weight", "fc.weight", "midlayer.mlp.up_proj.weight"])
def test_checkpoint_without_a_tensor_is_refused(checkpoint: Path, tmp_path: Path, missing: str) -> None:
    path = checkpoint / "model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if name != missing}, path)
    rewrite_state(checkpoint, lambda body: None)
    with pytest.raises(CheckpointError, match=missing):
        export(checkpoint, tmp_path / "draft", engine="vllm")
    assert not (tmp_path / "draft").exists()


def test_checkpoint_with_another_map_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    vocab_map(seed=1).save(checkpoint / "vocab_map.safetensors")
    with pytest.raises(CheckpointError, match=r"vocab_map\.safetensors"):
        export(checkpoint, tmp_path / "draft", engine="vllm")
    rewrite_state(checkpoint, lambda body: None)
    with pytest.raises(CheckpointError, match="expected vocabulary"):
        export(checkpoint, tmp_path / "draft", engine="vllm")


def test_what_the_check_refuses_is_not_published(checkpoint: Path, tmp_path: Path) -> None:
    """Weights that training would never save: the check of the export is what finds them."""
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["fc.weight"][0, 0] = torch.nan
    save_file(tensors, checkpoint / "model.safetensors")
    rewrite_state(checkpoint, lambda body: None)
    with pytest.raises(CheckpointError, match=r"nothing was exported: .*fc\.weight: expected finite weights"):
        export(checkpoint, tmp_path / "draft", engine="vllm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "store"]


def whole(draft: Path) -> bool:
    return sorted(path.name for path in draft.iterdir()) == sorted(FILES) and not check_export(draft).findings


def test_a_killed_export_leaves_no_draft_and_the_next_one_cleans_up(checkpoint: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "draft"
    output.parent.mkdir()
    words = ["export", "--checkpoint", str(checkpoint), "--output", str(output), "--engine", "vllm"]
    command = [sys.executable, "-m", "draftcache.tools.cli", *words]
    foreign = output.parent / ".draft.notes.partial"
    foreign.mkdir()
    for _ in range(20):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            wait_for(lambda: len(os.listdir(output.parent)) > 1)  # noqa: PTH208  # the quickest way to look
            process.kill()
        if not output.exists():
            break
        assert whole(output)
        shutil.rmtree(output)
    assert len(list(output.parent.glob(".draft.*.partial"))) == 2, "no kill came between beginning and end"
    subprocess.run(command, check=True, capture_output=True)
    assert whole(output)
    assert sorted(path.name for path in output.parent.iterdir()) == [foreign.name, "draft"]


def test_existing_output_is_not_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "draft").mkdir()
    with pytest.raises(InputError, match="new directory"):
        export(checkpoint, tmp_path / "draft", engine="vllm")
    assert load_state(checkpoint).finished


def positions_of(path: Path) -> int:
    return int(json.loads((path / "config.json").read_text())["max_position_embeddings"])


def test_positions_are_the_verifiers_or_what_is_asked_for(checkpoint: Path, tmp_path: Path) -> None:
    assert positions_of(export(checkpoint, tmp_path / "own", engine="vllm")) == 1024
    asked = export(checkpoint, tmp_path / "asked", engine="vllm", max_position_embeddings=300)
    assert positions_of(asked) == 300
    with pytest.raises(InputError, match="--max-position-embeddings: expected at least 1, found 0"):
        export(checkpoint, tmp_path / "none", engine="vllm", max_position_embeddings=0)


@pytest.mark.parametrize("named", [None, 0])
def test_positions_of_a_verifier_without_a_limit_are_those_of_the_store(tmp_path: Path, named: int | None) -> None:
    """Conversations of the store have 40 tokens. Earlier versions wrote 0 where a verifier names no limit."""
    write_store(tmp_path / "store", verifier=manifest().verifier | {"max_position_embeddings": named})
    last = Trainer(config(tmp_path, epochs=1)).run()
    assert positions_of(export(last, tmp_path / "draft", engine="vllm")) == 64
    rewrite_state(last, lambda body: body.update(longest=64))
    assert served_positions(last, load_state(last)) == 64
    rewrite_state(last, lambda body: body.update(longest=65))
    assert served_positions(last, load_state(last)) == 128
    rewrite_state(last, lambda body: body.pop("longest"))
    with pytest.raises(InputError, match=r"found neither.*--max-position-embeddings"):
        export(last, tmp_path / "old", engine="vllm")
    assert positions_of(export(last, tmp_path / "old", engine="vllm", max_position_embeddings=48)) == 48
