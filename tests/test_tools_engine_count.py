"""`draftcache eval --engine`: a running engine's verify steps beside the offline count, over real HTTP on loopback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draftcache.draft_train.evaluate import evaluate
from draftcache.draft_train.trainer import Trainer
from draftcache.store.reader import StoreReader
from draftcache.tools.cli import main
from draftcache.tools.engine_count import turns_of
from draftcache.tools.running_engine import RunningEngine, parse_counters
from support.engine_server import engine_server
from support.synthetic import write_store
from support.training_runs import config

Turns = dict[tuple[int, ...], tuple[list[int], int]]
DRAFT_TOKENS = 3


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("engine")
    write_store(made / "store", per_shard=6)
    Trainer(config(made, output=made / "run")).run()
    return made


@pytest.fixture(scope="module")
def turns(root: Path) -> Turns:
    """The turns of the split `val`, the first of each conversation with all verify steps that are counted offline."""
    store = StoreReader(root / "store")
    where: dict[str, Any] = {"store": root / "store", "checkpoint": root / "run", "splits": ["val"], "device": "cpu"}
    record = evaluate(**where, draft_tokens=DRAFT_TOKENS)["conversations"]["val"]
    found: Turns = {}
    for number, counts in zip(store.members("val"), record["counts"]["draft"], strict=True):
        item = store.read(int(number), ["token_ids", "loss_mask"])
        ids, left = item.arrays["token_ids"].tolist(), int(np.array(counts)[:, 0].sum())
        for first, end in turns_of(item.loss_mask):
            found[tuple(ids[:first])] = (ids[first:end], left)
            left = 0
    return found


def count(root: Path, url: str, *more: object) -> int:
    return main(
        [
            "eval", "--store", str(root / "store"), "--checkpoint", str(root / "run"), "--splits", "val", "--device",
            "cpu", "--resamples", "100", "--draft-tokens", str(DRAFT_TOKENS), "--engine", url, *map(str, more),
        ]
    )  # fmt: skip


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_equal_text_and_steps(root: Path, turns: Turns, engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    with engine_server(engine, turns) as server:
        assert count(root, server.url + "/v1", "--json") == 0
    found = json.loads(capsys.readouterr().out)["engine"]
    steps = sum(number for _, number in turns.values())
    assert (found["engine"], found["version"], found["model"]) == (engine, "1.2.3", "stand-in")
    assert (
        found["conversations_of_equal_text"]
        == found["conversations"]
        == len(StoreReader(root / "store").members("val"))
    )
    assert found["offline_verify_steps"] == found["engine_verify_steps"] == steps > 0
    assert found["tokens"] == sum(len(ids) - 1 for ids, _ in turns.values())
    assert found["engine_acceptance_length"] == pytest.approx(found["tokens"] / steps)
    answered = sum(number > 0 for _, number in turns.values())  # in one step of each of them, SGLang accepts one less
    accepted = [0, steps, 0] if engine == "vllm" else [steps, steps - answered, 0]
    assert (found["engine_drafted"], found["engine_accepted_by_position"]) == (steps * DRAFT_TOKENS, accepted)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_an_answer_of_one_token_takes_no_verify_step(engine: str) -> None:
    with engine_server(engine, {(5, 6): ([7], 0)}) as server, RunningEngine(server.url) as running:
        found = running.answer([5, 6], 1)
    assert (found.token_ids, found.verify_steps, found.drafted) == ([7], 0, 0)
    assert not any(found.accepted.values())


def test_the_table_says_what_was_compared(root: Path, turns: Turns, capsys: pytest.CaptureFixture[str]) -> None:
    with engine_server("vllm", turns) as server:
        assert count(root, server.url, "--engine-conversations", 2) == 0
    assert "vllm 1.2.3, stand-in: the store's text on 2 of 2 conversations; verify steps" in capsys.readouterr().out


def more_steps(turns: Turns) -> Turns:
    """5 % more verify steps."""
    return {prompt: (ids, steps + -(-steps // 20)) for prompt, (ids, steps) in turns.items()}


def other_text(turns: Turns) -> Turns:
    """Another last token in every turn, and many more verify steps, which must not count."""
    return {prompt: ([*ids[:-1], ids[-1] ^ 1], 50 * steps) for prompt, (ids, steps) in turns.items()}


@pytest.mark.parametrize(("changed", "equal"), [(more_steps, False), (other_text, None)])
def test_what_differs_ends_with_1(
    root: Path,
    turns: Turns,
    changed: Callable[[Turns], Turns],
    equal: bool | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Negative control of the tests above."""
    with engine_server("vllm", changed(turns)) as server:
        assert count(root, server.url, "--json") == 1
    found = json.loads(capsys.readouterr().out)["engine"]
    assert found["steps_equal"] is equal
    assert (found["conversations_of_equal_text"] == 0) == (equal is None)


def test_another_text_is_left_out_of_the_count(root: Path, turns: Turns, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one conversation: the others are still equal."""
    first = min(turns, key=len)
    mixed = turns | other_text({first: turns[first]})
    with engine_server("sglang", mixed) as server:
        assert count(root, server.url, "--json") == 0
    found = json.loads(capsys.readouterr().out)["engine"]
    assert found["conversations_of_equal_text"] == found["conversations"] - 1
    assert found["offline_verify_steps"] == found["engine_verify_steps"]


@pytest.mark.parametrize(
    ("engine", "settings", "message"),
    [
        ("vllm", {"draft_tokens": 5}, "--draft-tokens: expected what the engine at http://127.0.0.1:"),
        ("sglang", {"draft_tokens": 5}, "--draft-tokens: expected what the engine at http://127.0.0.1:"),
        ("vllm", {"others": 2}, "its counters can be read only while nobody else asks it"),
        ("vllm", {"speculates": False}, "found none named vllm:spec_decode_num_drafts_total; start it with "),
        ("vllm", {"models": ["a", "b"]}, "expected a server of one model, found ['a', 'b']"),
        ("sglang", {"speculates": False}, "expected spec_verify_ct in the answer's meta_info, found ['completion_"),
        ("other", {}, "or SGLang, which answers at /server_info; found neither"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    root: Path,
    turns: Turns,
    engine: str,
    settings: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with engine_server(engine, turns, **settings) as server:
        assert count(root, server.url) == 2
    assert message in capsys.readouterr().err


def test_no_server_and_no_conversation(root: Path, turns: Turns, capsys: pytest.CaptureFixture[str]) -> None:
    with engine_server("vllm", turns) as server:
        url = server.url
        assert count(root, url, "--engine-conversations", 0) == 2
    assert count(root, url) == 3
    told = capsys.readouterr().err
    assert "--engine-conversations: expected at least 1, found 0" in told
    assert f"{url}/metrics: expected an answer, found ConnectError" in told
    assert "run the command again once the server is back" in told


def test_turns_and_counters() -> None:
    assert turns_of(np.array([0, 0, 1, 1, 0, 1], bool)) == [(2, 4), (5, 6)]
    assert turns_of(np.array([1, 1, 0, 1], bool)) == []  # nothing comes before the first turn
    assert turns_of(np.zeros(3, bool)) == []
    page = (
        '# TYPE a counter\na_total{x="1"} 2.0\na_total{x="2"} 3.0\na_created{x="1"} 9\nb_total{position="4"} 1e3\nc 5\n'
    )
    assert parse_counters(page) == {"a_total": 5, "b_total#4": 1000}
