"""Truth: offline acceptance equals real greedy speculative decoding, on the shipped verifier and a trained draft."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.worker_job import CaptureJob
from draftcache.capture.prepare.job import PrepareConfig, prepare
from draftcache.capture.verifier.load import Verifier
from draftcache.draft_train.checkpoint import load_draft, load_state
from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.data.batches import build_batch
from draftcache.draft_train.data.frozen import FrozenWeights
from draftcache.draft_train.drafts.eagle3.unroll import unroll
from draftcache.draft_train.evaluate import evaluate
from draftcache.draft_train.trainer import Trainer
from draftcache.store.reader import StoreReader
from draftcache.tools.cli import main
from draftcache.tools.decoding import loop
from draftcache.tools.decoding.eagle3_cache import Eagle3Cache
from draftcache.tools.decoding.loop import speculative_greedy
from draftcache.tools.demo.pipeline import ASSETS, LAYERS, VERIFIER, load_demo_verifier, read_conversations
from draftcache.tools.demo.traces import encode_prompts, generate_batch, prompt_of, write_traces
from draftcache.tools.truth import online_check, truth_check
from support.draft_models import EAGLE31, STEPS, WINDOW, embeddings, make_model
from support.synthetic import LAYERS as SYNTHETIC_LAYERS
from support.synthetic import conversation, manifest, turns, vocab_map

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
TOKENS = 32
BLOCKS: dict[str, dict[str, Any]] = {
    "dspark": {"markov_rank": 32, "attention_sinks": True},
    "dflash": {"block_attention": "bidirectional"},
}
"""By architecture of block drafts, settings that it is tried with."""


@pytest.fixture(scope="module")
def verifier() -> Verifier:
    return load_demo_verifier()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(VERIFIER)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drafts of every architecture, each in a folder of its name, after 15 or 30 steps on 60 real conversations."""
    root = tmp_path_factory.mktemp("trained")
    rows = read_conversations(ASSETS / "conversations" / "train.jsonl.gz", 0, 60)
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(
        PrepareConfig(
            tokenizer=VERIFIER,
            output=root / "prepared",
            splits={"train": [root / "train.jsonl"]},
            held_out={},
            max_length=256,
            draft_vocab_size=1024,
            workers=1,
            progress=False,
        )
    )
    capture = CaptureConfig(
        verifier=VERIFIER, dataset=root / "prepared", output=root / "store", layers=LAYERS, window=64, device="cpu"
    )
    CaptureJob(capture).run()
    training = TrainConfig(
        store=root / "store", output=root / "eagle3", splits=("train",), epochs=4, batch_conversations=8,
        learning_rate=4e-3, sliding_window=24, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, device="cpu",
    )  # fmt: skip
    Trainer(training).run()
    for draft, more in BLOCKS.items():
        own = {"draft": draft, "output": root / draft, "ttt_steps": 0, "step_decay": 0.0, "loss": "", "epochs": 2}
        shape = {"num_hidden_layers": 2, "block_size": 6, "anchor_share": 0.1}
        Trainer(replace(training, **own | shape | more)).run()  # type: ignore[arg-type]
    Trainer(replace(training, output=root / "eagle31", epochs=2, eagle31=True)).run()
    return root


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    rows = read_conversations(ASSETS / "conversations" / "val.jsonl.gz", 0, 12)
    encoded = encode_prompts(tokenizer, [prompt_of(row["messages"]) for row in rows])
    return [ids for ids in encoded if len(ids) < 80][:4]


@pytest.mark.parametrize("name", ["eagle3", "eagle31", *BLOCKS])
def test_text_is_equal_and_verify_steps_are_equal(
    name: str, verifier: Verifier, tokenizer: Any, trained: Path, prompts: list[list[int]], tmp_path: Path
) -> None:
    truth = truth_check(
        verifier=verifier,
        verifier_path=VERIFIER,
        vocab_map=trained / "prepared" / "vocab_map.safetensors",
        checkpoint=trained / name,
        prompts=prompts,
        eos_token_id=int(tokenizer.eos_token_id),
        max_new_tokens=TOKENS,
        layers=LAYERS,
        directory=tmp_path / "truth",
    )
    assert truth.lossless
    assert truth.offline_steps == truth.online_steps
    # Some drafts were accepted and some were not, so that the equality says something.
    assert truth.tokens - truth.traces > truth.online_steps > truth.tokens / 6


@pytest.mark.parametrize("switches", [{}, EAGLE31])
def test_the_loop_proposes_what_the_unroll_chooses(switches: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain from each row; it is then the conversation that the unroll reads. A loop without a switch differs."""
    model, table, targets = make_model(**switches), embeddings(), torch.from_numpy(vocab_map().target_ids)
    item = conversation(np.random.default_rng(3), turns(30, (4, 30)))
    taps = torch.from_numpy(np.concatenate([item.arrays[f"tap_{layer}"] for layer in SYNTHETIC_LAYERS], axis=1))
    tokens = item.arrays["token_ids"].astype(int).tolist()

    def chain(row: int) -> list[int]:
        cache = Eagle3Cache(model, table)
        return [choice.token for choice in cache.propose(taps.double(), tokens[: row + 2], targets, STEPS)]

    def chosen(row: int) -> list[int]:
        proposed = tokens[: row + 2] + chains[row]
        read = np.array(proposed + tokens[len(proposed) :], np.uint32)
        one = replace(item, arrays=item.arrays | {"token_ids": read})
        batch = build_batch([one], manifest().codec, max_steps=STEPS, window=WINDOW)
        steps = unroll(model, table, batch, STEPS)
        start = int((batch.key_positions[batch.start_index] == row).nonzero())
        logits = [model.logits(step.hidden)[int((step.rows == start).nonzero())] for step in steps]
        return [int(targets[int(values.argmax())]) for values in logits]

    with torch.inference_mode():
        chains = {row: chain(row) for row in range(3, 20)}
        assert chains == {row: chosen(row) for row in chains}
        monkeypatch.setattr(model, "combine", lambda taps: model.fc(taps))
        assert bool(switches) == (chains != {row: chain(row) for row in chains})
        monkeypatch.undo()
        monkeypatch.setattr(model, "carried", lambda hidden: hidden)
        assert bool(switches) == (chains != {row: chain(row) for row in chains})


def online(trained: Path, verifier_path: Path, *more: str) -> int:
    return main(
        [
            "eval", "--store", str(trained / "store"), "--checkpoint", str(trained / "eagle3"), "--splits", "train",
            "--device", "cpu", "--online", "--verifier", str(verifier_path), "--online-prompts", "6",
            "--online-tokens", "24", "--resamples", "100", *more,
        ]
    )  # fmt: skip


def test_the_check_needs_only_a_store_and_its_verifier(trained: Path, tmp_path: Path) -> None:
    found = online_check(
        store=trained / "store",
        verifier_path=VERIFIER,
        checkpoint=trained / "eagle3",
        splits=["train"],
        prompts=2,
        max_new_tokens=16,
        draft_tokens=5,
        directory=tmp_path,
        device=torch.device("cpu"),
    )
    assert (found.traces, found.lossless, found.offline_equals_online) == (2, True, True)
    assert 2 < found.online_steps < found.tokens


def test_as_a_command_it_ends_with_1_where_decoding_reads_other_states(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop._greedy

    def shifted(verifier: Any, tokens: list[int], layers: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        choices, aux = original(verifier, tokens, layers)
        return choices, torch.roll(aux, 1, dims=0)

    monkeypatch.setattr(loop, "_greedy", shifted)
    assert online(trained, VERIFIER, "--json") == 1
    found = json.loads(capsys.readouterr().out)["online"]
    assert (found["text_equal"], found["steps_equal"]) == (True, False)


def test_another_verifier_is_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(VERIFIER, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, tmp_path / "other" / "model.safetensors")
    assert online(trained, tmp_path / "other") == 2
    assert "the count of another verifier says nothing of this store" in capsys.readouterr().err


def test_states_of_the_row_before_keep_the_text_and_cost_steps(
    verifier: Verifier,
    tokenizer: Any,
    trained: Path,
    prompts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative control: feeding the draft h_{t-1} for h_t is invisible in the text, and visible in the count."""
    path = next((trained / "eagle3" / "checkpoints").iterdir())
    draft = load_draft(path, load_state(path), torch.device("cpu"))
    store = StoreReader(trained / "store")
    embeddings = FrozenWeights.load(store, torch.device("cpu")).embed_tokens
    target_ids = torch.from_numpy(store.vocab_map().target_ids)

    def decode() -> tuple[list[list[int]], int]:
        results = [
            speculative_greedy(
                verifier, draft, embeddings, target_ids, LAYERS, prompt,
                max_new_tokens=TOKENS, eos_token_id=int(tokenizer.eos_token_id),
            )
            for prompt in prompts
        ]  # fmt: skip
        return [result.token_ids for result in results], sum(result.verify_steps for result in results)

    text, steps = decode()
    original = loop._greedy

    def shifted(verifier: Any, tokens: list[int], layers: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        choices, aux = original(verifier, tokens, layers)
        return choices, torch.roll(aux, 1, dims=0)

    monkeypatch.setattr(loop, "_greedy", shifted)
    shifted_text, shifted_steps = decode()
    assert shifted_text == text
    assert shifted_steps > steps


def test_batched_traces_are_the_plain_greedy_ones(verifier: Verifier, tokenizer: Any, tmp_path: Path) -> None:
    rows = read_conversations(ASSETS / "conversations" / "val.jsonl.gz", 0, 6)
    messages = [prompt_of(row["messages"]) for row in rows]
    generate = partial(generate_batch, verifier.model, max_new_tokens=16, eos_token_id=int(tokenizer.eos_token_id))
    write_traces(partial(map, generate), tokenizer, messages, tmp_path / "t.jsonl", max_prompt_tokens=100, batch_size=4)
    written = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text().splitlines()]
    assert len(written) >= 4
    for row in written:
        prompt = [token for token, mask in zip(row["token_ids"], row["loss_mask"], strict=True) if not mask]
        trace = row["token_ids"][len(prompt) :]
        plain = loop.plain_greedy(verifier, prompt, max_new_tokens=16, eos_token_id=int(tokenizer.eos_token_id))
        assert trace == plain


def test_evaluation_stands_beside_its_baselines(trained: Path) -> None:
    where: dict[str, Any] = {"store": trained / "store", "checkpoint": trained / "eagle3", "splits": ["train"]}
    assert list(evaluate(**where, device="cpu")["splits"]["train"]) == ["draft", "untrained"]
    result = evaluate(**where, bigram_splits=["train"], device="cpu")
    row = result["splits"]["train"]
    assert row["draft"]["kind"].startswith("teacher-forced (")
    assert row["draft"]["acceptance_length"] > row["untrained"]["acceptance_length"]
    assert 1.0 <= row["untrained"]["acceptance_length"] < 1.2
    assert row["bigram"]["acceptance_length"] > 1.0
    assert row["draft"]["verify_steps"] < row["draft"]["tokens"]
