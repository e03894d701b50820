"""The comparison of draft architectures: its timed proposals are the drafts' own, and its rows what they say."""

from __future__ import annotations

import contextlib
import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.drafts.block.model import BlockModel
from draftcache.draft_train.drafts.eagle3.model import Eagle3Model
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.errors import InputError
from draftcache.store.common.files import read_json
from draftcache.tools.bench import drafts
from draftcache.tools.bench.parts.ablation_bench import Bench, Setup, sweep_file
from draftcache.tools.bench.parts.ablation_jobs import Jobs
from draftcache.tools.bench.parts.draft_cases import CASES, SHARED, split_settings
from draftcache.tools.bench.parts.draft_timing import BlockStep, DraftStep, Eagle3Step, draft_step
from draftcache.tools.bench.parts.train_cases import SHAPE
from draftcache.tools.bench.parts.train_loader import write_store
from draftcache.tools.bench.parts.verifier_timing import VerifierClock
from draftcache.tools.cli import main
from draftcache.tools.decoding.block_cache import BlockCache
from draftcache.tools.decoding.eagle3_cache import Eagle3Cache
from draftcache.tools.students_t import half_width
from draftcache.tools.sweep.plan import read_sweep
from support import block_models, draft_models
from support.synthetic import DRAFT_VOCAB, HIDDEN, LAYERS, VOCAB
from support.tiny_models import VOCAB as TINY_VOCAB
from support.tiny_models import save_model
from support.training_runs import metrics

CONTEXT, COUNT, SEQUENCES = 9, 3, 2
ROWS = CONTEXT + COUNT + 1
TARGETS = torch.arange(DRAFT_VOCAB) * VOCAB // DRAFT_VOCAB
MODELS: dict[str, Callable[[], Eagle3Model | BlockModel]] = {
    "eagle3": draft_models.make_model,
    "eagle3 full": lambda: draft_models.make_model(None),
    "eagle31": lambda: draft_models.make_model(**draft_models.EAGLE31),
    **{
        name: lambda changes=changes: block_models.make_model(block_models.make_shape(**changes))  # type: ignore[misc]
        for name, changes in block_models.SHAPES.items()
    },
}


def texts() -> tuple[Tensor, list[list[int]]]:
    """Taps [sequences, rows, taps * H] of random texts, and their tokens, one more than rows."""
    generator = torch.Generator().manual_seed(3)
    taps = torch.randn(SEQUENCES, ROWS, len(LAYERS) * HIDDEN, generator=generator, dtype=torch.float64)
    tokens = torch.randint(VOCAB - 1, (SEQUENCES, ROWS + 1), generator=generator)
    return taps, tokens.tolist()


def filled(model: Eagle3Model | BlockModel, taps: Tensor, tokens: list[list[int]]) -> DraftStep:
    """A step whose cache holds the keys of the first CONTEXT rows, and whose inputs are the rest of the texts."""
    table = draft_models.embeddings()
    step = draft_step(model, table, TARGETS, count=COUNT, sequences=SEQUENCES, context=CONTEXT)
    step.taps.copy_(taps[:, CONTEXT:].flatten(0, 1))
    step.tokens.copy_(torch.tensor(tokens)[:, CONTEXT + 1 :])
    for number in range(SEQUENCES):
        if isinstance(step, Eagle3Step):
            assert isinstance(model, Eagle3Model)
            cache = Eagle3Cache(model, table)
            cache.extend(taps[number], tokens[number][: CONTEXT + 1])
            kept = [torch.stack((torch.stack(cache.keys, 1), torch.stack(cache.values, 1)))]
            layers = [step.weights]
        else:
            assert isinstance(step, BlockStep)
            blocks = BlockCache(step.model, table)
            blocks._extend(taps[number], CONTEXT)
            kept = [torch.stack(rows, dim=2) for rows in blocks.context]
            layers = step.layers
        for layer, kv in zip(layers, kept, strict=True):
            layer.cache[:, number, :, :CONTEXT] = kv
    return step


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_what_is_timed_proposes_what_the_draft_proposes(name: str) -> None:
    model = MODELS[name]()
    taps, tokens = texts()
    step = filled(model, taps, tokens)
    caches = [
        (Eagle3Cache if isinstance(model, Eagle3Model) else BlockCache)(model, draft_models.embeddings())  # type: ignore[arg-type]
        for _ in range(SEQUENCES)
    ]
    made = [cache.propose(taps[number], tokens[number], TARGETS, COUNT) for number, cache in enumerate(caches)]
    expected = [[choice.token for choice in chain] for chain in made]
    assert step().tolist() == expected
    assert step().tolist() == expected  # the same call makes them again
    step.taps.mul_(-3)  # negative control: what the verify step has added is read
    step.tokens.copy_((step.tokens + 7) % VOCAB)
    assert step().tolist() != expected


def test_weights_that_a_proposal_reads() -> None:
    eagle, block = MODELS["eagle3"](), MODELS["dspark"]()
    read = {
        name: draft_step(
            model, draft_models.embeddings(), TARGETS, count=count, sequences=1, context=CONTEXT
        ).parameters_read()
        for name, model, count in (("e1", eagle, 1), ("e3", eagle, 3), ("b1", block, 1), ("b3", block, 3))
    }
    whole = sum(value.numel() for value in eagle.parameters())
    fc = eagle.fc.weight.numel()
    assert (read["e1"], read["e3"]) == (whole, 3 * whole - 2 * fc)
    assert read["b3"] - read["b1"] == 2 * 3 * DRAFT_VOCAB  # the second matrix of the Markov head, of rank 3


RATES = [1e-3, 1e-1]
SIZES: dict[str, Any] = {
    "sliding_window": 16, "top_k": 0, "num_attention_heads": 4, "head_dim": 16, "intermediate_size": 32,
    "eval_conversations": 4, "batch_conversations": 1,
}  # fmt: skip


def setup(root: Path) -> Setup:
    return Setup(
        verifier=root / "verifier", dataset=root, layers="auto", train_split="train", eval_split="train",
        first_split="train", first_share=1.0, turns_inputs={}, vocab_map=None, draft_vocab_size=1600,
        work=root / "work", seeds=2, device="cpu", train=SHARED | SIZES, capture={},
    )  # fmt: skip


def swept(bench: Bench, name: str, seed: int, store: Path, axes: Any = None, **settings: Any) -> list[dict[str, Any]]:
    """Train what `Bench.swept` has `draftcache sweep` train, in this process, on a file that is a sweep's."""
    path = bench.setup.work / f"{name}-{seed}.toml"
    shared = {"store": str(store), "splits": ["train"], "eval_split": "train", **bench.setup.train, **settings}
    path.write_text(sweep_file(shared, {**(axes or {}), "seed": [seed]}))
    found = []
    for trial in read_sweep(path, bench.setup.work / f"{name}-{seed}").trials:
        Trainer(replace(trial.config, device="cpu")).run()
        last = metrics(trial.config.output)[-1]
        found.append(
            {
                "axes": trial.axes,
                "run": trial.config.output,
                "steps": last["step"],
                "acceptance_length": last["eval_acceptance_length"],
            }
        )
    return found


def run(jobs: Jobs, name: str, priority: int, *words: object) -> str:
    """Run a command as `Jobs.run` does, in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        assert main([str(word) for word in words]) == 0
    return text.getvalue()


def test_cases_are_trained_evaluated_and_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = replace(
        SHAPE, hidden_size=32, num_attention_heads=4, head_dim=16, vocab_size=4096, draft_vocab_size=1600,
        sliding_window=64,
    )  # fmt: skip
    write_store(tmp_path / "store", shape, 60, 4, torch.device("cpu"))
    save_model(tmp_path / "verifier", "llama")
    monkeypatch.setattr(Bench, "store", lambda _: tmp_path / "store")
    monkeypatch.setattr(Bench, "swept", swept)
    monkeypatch.setattr(Jobs, "run", run)
    monkeypatch.setattr(drafts, "CONTEXT", 20)
    monkeypatch.setattr(drafts, "BATCHES", (1, 2))
    names = ["eagle3-1", "dflash-1", "dspark-3"]
    output = tmp_path / "rows.json"
    assert drafts.measure(setup(tmp_path), names, RATES, {"dspark.markov_rank": 8}, 1, output) == 0
    rows = read_json(output)
    found = {(row["case"], row["metric"]): row["value"] for row in rows}
    for name in names:
        for count in drafts.TOKENS:
            length = found[name, f"acceptance_length@{count}"]
            share = found[name, f"draft_ms@{count}"] / found["verifier", f"verify_ms@{count}"]
            assert length >= 1
            assert found[name, f"speedup@{count}"] == pytest.approx(length / (1 + share))
            assert found[name, f"draft_ms@{count},batch=2"] > 0
            assert ((name, f"difference@{count}") in found) == (name != "eagle3-1")
        assert found[name, "learning_rate"] in RATES
        assert (found[name, "trials"], found[name, "optimizer_steps"]) == (2, 4)
    assert found["dspark-3", "draft_parameters"] > found["dflash-1", "draft_parameters"]
    monkeypatch.setattr("sys.argv", ["drafts", "--table", "--output", str(output)])
    capsys.readouterr()
    assert drafts.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| d")][1:] == ["dflash-1", "dspark-3"]
    pytest.importorskip("matplotlib")
    assert (tmp_path / "rows.png").stat().st_size > 10_000


def test_the_learning_rate_is_the_one_that_seed_0_did_best_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[int, Any]] = []

    def fake(_: Bench, name: str, seed: int, store: Path, axes: Any = None, **settings: Any) -> Any:
        asked.append((seed, settings.get("learning_rate")))
        rates = axes["learning_rate"] if axes else [settings["learning_rate"]]
        return [{"axes": {"learning_rate": rate}, "acceptance_length": 2 - abs(rate - 1e-3)} for rate in rates]

    monkeypatch.setattr(Bench, "store", lambda _: tmp_path)
    monkeypatch.setattr(Bench, "swept", fake)
    bench = Bench(setup(tmp_path), Jobs(1, tmp_path / "logs"))
    trials = drafts.trained(bench, CASES["dspark-5"], [5e-4, 1e-3, 4e-3], {})
    assert asked == [(0, None), (1, 1e-3)]
    assert [trial["learning_rate"] for trial in trials] == [1e-3, 1e-3]


def test_rows_of_acceptance_are_means_and_paired_differences() -> None:
    def trials(lengths: Sequence[float]) -> list[dict[str, Any]]:
        return [
            {"lengths": dict.fromkeys(drafts.TOKENS, length), "learning_rate": 1e-3, "steps": 7} for length in lengths
        ]

    mine, theirs = [1.5, 1.7, 1.6], [1.6, 1.9, 1.7]
    rows = drafts.acceptance_rows({"eagle3-1": trials(theirs), "dspark-3": trials(mine)}, "cpu")
    found = {(row["case"], row["metric"]): row["value"] for row in rows}
    assert found["dspark-3", "acceptance_length@5"] == pytest.approx(statistics.fmean(mine))
    assert found["dspark-3", "difference@5"] == pytest.approx(-0.4 / 3)
    assert found["dspark-3", "difference_half_width@5"] == pytest.approx(half_width([-0.1, -0.2, -0.1]))
    alone = drafts.acceptance_rows({"dspark-3": trials(mine)}, "cpu")
    assert not [row for row in alone if row["metric"].startswith("difference")]


def test_settings_of_one_architecture() -> None:
    shared, own = split_settings({"epochs": 2, "dspark.markov_rank": 8, "eagle3.ttt_steps": 4})
    assert shared == {"epochs": 2}
    assert CASES["dspark-3"].settings(own) == {
        "draft": "dspark", "block_size": 8, "num_hidden_layers": 3, "markov_rank": 8,
    }  # fmt: skip
    assert CASES["eagle3-1"].settings(own) == {"draft": "eagle3", "ttt_steps": 4}
    with pytest.raises(InputError, match=r"found \['eagle2.loss'\]"):
        split_settings({"eagle2.loss": "ce"})
    assert set(SHARED) <= set(TrainConfig.__dataclass_fields__)


def test_every_step_of_a_verifier_reads_its_cache_and_is_the_same(tmp_path: Path) -> None:
    clock = VerifierClock(save_model(tmp_path, "llama"), torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    step = clock._step(4, 2, 11)
    torch.manual_seed(0)
    whole = clock.model(torch.randint(TINY_VOCAB, (2, 15))).logits
    for _ in range(2):
        torch.testing.assert_close(step(), whole[:, 11:], rtol=1e-4, atol=1e-5)
