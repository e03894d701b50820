"""A second architecture is trained, resumed, evaluated and exported with no change outside its own module."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draftcache.draft_train.checkpoint import checkpoints, load_draft, load_state, resolve_checkpoint
from draftcache.draft_train.drafts.registry import architecture_names, find_architecture, register
from draftcache.draft_train.drafts.sizes import BatchRows
from draftcache.draft_train.evaluate import evaluate
from draftcache.draft_train.export import export
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.errors import CheckpointError, InputError
from support.linear_draft import ARCHITECTURE, LinearShape
from support.synthetic import write_store
from support.training_runs import config, metrics, rewrite_state


@pytest.fixture(autouse=True)
def _linear() -> None:
    register(ARCHITECTURE)


def test_a_second_architecture_trains_resumes_and_is_evaluated_and_exported(tmp_path: Path) -> None:
    write_store(tmp_path / "store", per_shard=6)
    settings = config(tmp_path, draft="linear", epochs=20, learning_rate=0.05, eval_split="val", eval_every=30)
    last = Trainer(settings).run()
    losses = [row["loss"] for row in metrics(settings.output)]
    assert losses[-1] < 0.8 * losses[0]
    assert "eval_acceptance_length" in metrics(settings.output)[-1]

    state = load_state(last)
    assert state.architecture == "linear"
    assert state.shape == LinearShape(
        hidden_size=8, taps=3, vocab_size=40, draft_vocab_size=24, sliding_window=1, steps=3
    )

    cut = replace(settings, output=tmp_path / "cut", eval_split=None, eval_every=0)
    Trainer(cut).run()
    for path in checkpoints(cut.output)[1:]:
        shutil.rmtree(path)
    resumed = Trainer(cut).run()  # from the oldest checkpoint that was kept
    whole, again = load_file(last / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)

    figures = evaluate(store=tmp_path / "store", checkpoint=settings.output, splits=["train"], draft_tokens=3)
    found = figures["splits"]["train"]
    assert found["draft"]["acceptance_length"] > found["untrained"]["acceptance_length"]

    with pytest.raises(InputError, match=r"--engine: expected one of \['toy'\]"):
        export(settings.output, tmp_path / "draft", engine="vllm")
    export(settings.output, tmp_path / "draft", engine="toy", dtype="float32")
    assert json.loads((tmp_path / "draft" / "config.json").read_text())["steps"] == 3
    assert set(load_file(tmp_path / "draft" / "model.safetensors")) == {*whole, "d2t"}


def test_checkpoints_of_another_architecture_are_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "store")
    Trainer(config(tmp_path, epochs=1, output=tmp_path / "eagle3")).run()
    with pytest.raises(CheckpointError, match="draft architecture is 'eagle3', here it is 'linear'"):
        Trainer(config(tmp_path, draft="linear", init_from=tmp_path / "eagle3")).run()


def test_a_checkpoint_without_an_architecture_is_eagle3(tmp_path: Path) -> None:
    write_store(tmp_path / "store")
    last = Trainer(config(tmp_path, epochs=1)).run()
    rewrite_state(last, lambda body: (body.pop("architecture"), body["objective"].pop("draft")))
    state = load_state(resolve_checkpoint(tmp_path / "run"))
    assert state.architecture == "eagle3"
    assert load_draft(last, state, torch.device("cpu")).shape == state.shape
    assert Trainer(config(tmp_path, epochs=1)).run() == last  # it is resumed, and there is nothing left to do


def test_flags_of_a_fused_pass_are_refused_where_there_is_none(tmp_path: Path) -> None:
    write_store(tmp_path / "store")
    for changes, flag in (({"compute": "fused"}, "--compute fused"), ({"recompute_mlp": True}, "--recompute-mlp")):
        with pytest.raises(InputError, match=f"{flag}: expected a fused pass"):
            Trainer(config(tmp_path, draft="linear", **changes))
    with pytest.raises(InputError, match="--eagle31: expected it with --draft eagle3, which has it, found --draft dfl"):
        config(tmp_path, draft="dflash", ttt_steps=0, eagle31=True)


def test_names() -> None:
    assert architecture_names() == ["dflash", "dspark", "eagle3", "linear"]
    with pytest.raises(
        InputError, match=r"--draft: expected one of \['dflash', 'dspark', 'eagle3', 'linear'\], found 'medusa'"
    ):
        find_architecture("medusa")


def test_memory_is_the_architectures(tmp_path: Path) -> None:
    shape = LinearShape(hidden_size=8, taps=3, vocab_size=40, draft_vocab_size=24, sliding_window=1, steps=3)
    found = ARCHITECTURE.peak_bytes(shape, config(tmp_path), BatchRows(rows=10, starts=5, top_k=6))
    assert sum(found.values()) == 16 * 3 * 24 * 24 + 4 * 5 * 24
