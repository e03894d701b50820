"""Traces of a verifier in this process: batches give what prompts one by one give, greedy or sampled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList

from draftcache.capture.generate import in_process
from draftcache.capture.generate.config import GenerateConfig
from draftcache.capture.generate.in_process import SeededNoise, VerifierEngine, generate_batch
from draftcache.capture.generate.job import generate
from draftcache.capture.generate.traces import ROWS
from draftcache.store.common.errors import InputError
from draftcache.tools.cli import main
from support.chat_tokenizers import CHATML, save_tokenizer
from support.paths import ROOT
from support.tiny_models import KINDS, make_model, save_model

DEMO = ROOT / "tools" / "demo" / "assets" / "verifier"
PROMPTS: list[list[int]] = [[5, 9, 17], [44, 3, 8, 120, 7, 61, 250, 33, 90], [12] * 5 + [400], [77, 300]]


def continued(model: Any, prompts: Sequence[Sequence[int]], **more: Any) -> list[list[int]]:
    settings: dict[str, Any] = {"max_new_tokens": 12, "stop_ids": [], "processors": LogitsProcessorList(), **more}
    width = max(map(len, prompts))
    return [row[width:].tolist() for row in generate_batch(model, prompts, **settings).sequences]


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch_gives_what_prompts_alone_give(kind: str) -> None:
    model = make_model(kind)
    alone = [continued(model, [prompt])[0] for prompt in PROMPTS]
    assert continued(model, PROMPTS) == alone
    assert continued(model, PROMPTS, masked=False) != alone  # the negative control


def test_a_seed_decides_its_row_whatever_is_beside_it() -> None:
    model = make_model("llama")
    device = torch.device("cpu")
    seeds = [7, 8, 7, 10]
    batch = continued(model, PROMPTS, processors=LogitsProcessorList([SeededNoise(seeds, device)]))
    for prompt, seed, found in zip(PROMPTS, seeds, batch, strict=True):
        assert continued(model, [prompt], processors=LogitsProcessorList([SeededNoise([seed], device)])) == [found]
    other = continued(model, PROMPTS[:1], processors=LogitsProcessorList([SeededNoise([70], device)]))
    assert other != batch[:1]  # the negative control


def test_noise_samples_the_softmax() -> None:
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0, float("-inf")]).repeat(20_000, 1)
    noise = SeededNoise(range(20_000), torch.device("cpu"))
    found = torch.bincount(noise(torch.zeros(0), scores).argmax(-1), minlength=5) / 20_000
    assert (found - scores[0].softmax(-1)).abs().max() < 0.015
    assert found[4] == 0


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A NemotronH with the ChatML tokenizer; its end of turn is a token that it does write now and then."""
    path = save_model(tmp_path_factory.mktemp("verifiers") / "nemotron_h", "nemotron_h")
    return save_tokenizer(path, CHATML)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "why " * (1 + number * 5 % 7) + f"{number}?"} for number in range(11)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def config(prompts: Path, verifier: Path, output: str = "traces", **more: Any) -> GenerateConfig:
    settings = {"max_new_tokens": 8, "batch_size": 4, "progress": False, **more}
    return GenerateConfig(verifier=verifier, output=prompts.parent / output, splits={"train": [prompts]}, **settings)


def rows_of(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "train" / ROWS).read_bytes().splitlines()]


def test_traces_are_the_verifiers_own_greedy_answers(prompts: Path, verifier: Path) -> None:
    generate(config(prompts, verifier))
    model = make_model("nemotron_h")
    rows = rows_of(prompts.parent / "traces")
    assert len(rows) == 11
    for row in rows:
        start = row["loss_mask"].index(1)
        ids, answer = torch.tensor([row["token_ids"]]), row["token_ids"][start:]
        with torch.inference_mode():
            best = model(ids).logits[0].argmax(-1).tolist()
        assert best[start - 1 : -1] == answer
        assert row["finish_reason"] == ("stop" if answer[-1] == 1 else "length")
        assert 1 not in answer[:-1]


def test_a_resumed_job_makes_the_same_batches(prompts: Path, verifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "samples": 2, "batch_size": 3}
    generate(config(prompts, verifier, "whole", **sampled))
    batches: list[list[str]] = []
    run = VerifierEngine._answers

    def dies(engine: VerifierEngine, batch: Any) -> Any:
        if len(batches) == 3:
            raise MemoryError
        batches.append([sample.key for sample in batch])
        return run(engine, batch)

    monkeypatch.setattr(VerifierEngine, "_answers", dies)
    with pytest.raises(MemoryError):
        generate(config(prompts, verifier, **sampled))
    monkeypatch.setattr(VerifierEngine, "_answers", run)
    assert generate(config(prompts, verifier, **sampled)).answered == 22 - 9
    whole, resumed = ((prompts.parent / name / "train" / ROWS).read_bytes() for name in ("whole", "traces"))
    assert resumed == whole
    assert len({row["answer"] for row in rows_of(prompts.parent / "whole")}) > 15


class Careless:
    """A model whose logits padding changes, or any neighbour."""

    def __init__(self, model: Any, changes: str) -> None:
        self._model, self._changes = model, changes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, **arguments: Any) -> Any:
        if self._changes == "padding":
            arguments["attention_mask"] = torch.ones_like(arguments["attention_mask"])
        output = self._model.generate(**arguments)
        if self._changes == "neighbours" and len(output.sequences) > 1 and output.logits:
            output.logits = tuple(step + torch.randn(step.shape) for step in output.logits)
        return output


@pytest.mark.parametrize(
    ("changes", "batching"), [("nothing", "padded"), ("padding", "equal"), ("neighbours", "alone")]
)
def test_what_a_batch_changes_decides_how_batches_are_made(
    prompts: Path, verifier: Path, monkeypatch: pytest.MonkeyPatch, changes: str, batching: str
) -> None:
    engines = []
    begin = VerifierEngine.__init__

    def careless(engine: VerifierEngine, *arguments: Any) -> None:
        begin(engine, *arguments)
        engine._model = Careless(engine._model, changes)
        engines.append(engine)

    monkeypatch.setattr(VerifierEngine, "__init__", careless)
    generate(config(prompts, verifier, "found"))
    assert engines[0].batching == batching
    monkeypatch.setattr(in_process, "_ALIKE", {torch.float32: 1e-3})
    monkeypatch.setattr(VerifierEngine, "__init__", begin)
    generate(config(prompts, verifier, "expected", batch_size=1))
    assert [row["token_ids"] for row in rows_of(prompts.parent / "found")] == [
        row["token_ids"] for row in rows_of(prompts.parent / "expected")
    ]


def test_prompts_that_do_not_fit_are_quarantined(prompts: Path, verifier: Path) -> None:
    long = json.dumps({"prompt": "東京" * 400})
    prompts.write_text(f'{{"prompt": "why?"}}\n{long}\n', encoding="utf-8")
    done = generate(config(prompts, verifier))
    assert done.manifest["splits"]["train"]["quarantined_by_reason"] == {"prompt-too-long": 1}


def test_another_verifier_does_not_go_on_with_the_traces(prompts: Path, verifier: Path, tmp_path: Path) -> None:
    settings = config(prompts, verifier)
    generate(settings)
    other = save_tokenizer(save_model(tmp_path / "other", "llama"), CHATML)
    with pytest.raises(InputError, match="found another job's: model: "):
        generate(replace(settings, verifier=other))


def test_the_demos_verifier_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From prompts to a prepared dataset, with the words of the README."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "What is a list?"}\n{"prompt": "How do I close a file?"}\n')
    words = ["--verifier", DEMO, "--output", tmp_path / "traces", "--max-new-tokens", 40]
    assert main(["generate", *map(str, words), f"train={tmp_path / 'prompts.jsonl'}"]) == 0
    assert "train: 2 rows" in capsys.readouterr().out
    prepared = ["--tokenizer", DEMO, "--output", tmp_path / "prepared", "--workers", 1]
    assert main(["prepare", *map(str, prepared), f"train={tmp_path / 'traces' / 'train'}"]) == 0
    assert "train" in capsys.readouterr().out
