"""Traces from a real HTTP server on loopback: what is asked, what becomes of what it says, and what prepare reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draftcache.capture.generate.config import GenerateConfig
from draftcache.capture.generate.job import generate
from draftcache.capture.generate.traces import MANIFEST, QUARANTINE, ROWS
from draftcache.capture.prepare.chat.settings import ChatSettings
from draftcache.capture.prepare.job import PrepareConfig, prepare
from draftcache.capture.prepare.token_dataset import TokenDataset
from draftcache.store.common.errors import InputError, ManifestMismatchError
from support.answer_server import MODEL, AnswerServer, answer_server

QUESTION = {"role": "user", "content": "why?"}


@pytest.fixture
def answers(tokenizer_dir: Path) -> Iterator[AnswerServer]:
    with answer_server(tokenizer_dir) as running:
        yield running


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def questions(count: int) -> list[dict[str, Any]]:
    return [{"id": f"q{number}", "prompt": f"what is {number}?"} for number in range(count)]


def config(
    directory: Path, server: AnswerServer, rows: list[Any], output: str = "traces", **more: Any
) -> GenerateConfig:
    path = directory / "prompts.jsonl"
    if not path.exists():
        write_rows(path, rows)
    settings = {"max_new_tokens": 64, "concurrency": 4, "progress": False, "retries": 2, **more}
    return GenerateConfig(
        tokenizer=server.tokenizer, output=directory / output, splits={"train": [path]}, server=server.url, **settings
    )


def rows_of(output: Path, split: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / split / ROWS).read_bytes().splitlines()]


def rejected(output: Path, split: str = "train") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / QUARANTINE / f"{split}.jsonl").read_bytes().splitlines()]


def test_prompts_become_rows_that_prepare_masks_right(tmp_path: Path, answers: AnswerServer) -> None:
    result = generate(config(tmp_path, answers, questions(9)))
    rows = rows_of(tmp_path / "traces")
    assert result.answered == 9
    assert result.quarantined == 0
    assert [row["id"] for row in rows] == [f"q{number}" for number in range(9)]
    for number, row in enumerate(rows):
        prompt = answers.rendered([{"role": "user", "content": f"what is {number}?"}])
        text = answers.text(prompt, {})
        assert row["token_ids"][: len(prompt)] == prompt
        assert answers.backend.decode(row["token_ids"][len(prompt) : -1]) == text
        assert row["token_ids"][-1] == answers.eos
        assert row["finish_reason"] == "stop"
        assert row["answer"] == text + "<|im_end|>"
    folder = tmp_path / "traces" / "train"
    settings = PrepareConfig(
        tokenizer=answers.tokenizer, output=tmp_path / "p", splits={"train": sorted(folder.iterdir())}, held_out={},
        workers=1, progress=False,
    )  # fmt: skip
    prepare(settings)
    dataset = TokenDataset.open(tmp_path / "p")
    for number, row in enumerate(rows):
        token_ids, loss_mask, _ = dataset.split("train")[number]
        assert token_ids.tolist() == row["token_ids"]
        assert loss_mask.astype(int).tolist() == row["loss_mask"]
        assert row["loss_mask"] == [0] * row["loss_mask"].count(0) + [1] * row["loss_mask"].count(1)


def test_what_is_asked_leaves_no_default_to_the_server(tmp_path: Path, answers: AnswerServer) -> None:
    generate(config(tmp_path, answers, questions(1), temperature=0.7, top_p=0.9, top_k=20, samples=3))
    assert len({asked["seed"] for asked in answers.requests}) == 3
    for asked in answers.requests:
        assert asked["model"] == MODEL
        assert asked["max_tokens"] == 64
        assert (asked["temperature"], asked["top_p"], asked["top_k"]) == (0.7, 0.9, 20)
        assert asked["repetition_penalty"] == 1.0
        assert asked["min_p"] == 0.0
        assert asked["return_token_ids"] is True
        assert asked["skip_special_tokens"] is False
        assert asked["prompt"] == answers.rendered([{"role": "user", "content": "what is 0?"}])
    assert [row["sample"] for row in rows_of(tmp_path / "traces")] == [0, 1, 2]
    assert len({row["answer"] for row in rows_of(tmp_path / "traces")}) == 3


def test_the_key_is_sent_and_written_nowhere(
    tmp_path: Path, answers: AnswerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-this-test")
    generate(config(tmp_path, answers, questions(2)))
    assert {headers["Authorization"] for headers in answers.headers} == {"Bearer sk-secret-of-this-test"}
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert not any(b"sk-secret" in data for data in written)


@pytest.mark.parametrize(
    ("rule", "ends"), [("last-user", [[0, 5]]), ("first-user", [[0, 2]]), ("each-user", [[0, 2], [0, 5]])]
)
def test_what_of_a_conversation_is_the_prompt(
    tmp_path: Path, answers: AnswerServer, rule: str, ends: list[list[int]]
) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        QUESTION,
        {"role": "assistant", "content": "because"},
        {"role": "human", "content": "and?"},
        {"role": "user", "content": "well?"},
        {"role": "assistant", "content": "dropped"},
    ]
    nothing = {"messages": [{"role": "system", "content": "no question"}]}
    done = generate(config(tmp_path, answers, [{"messages": messages}, nothing], continue_from=rule))
    known = [{**message, "role": "user"} if message["role"] == "human" else message for message in messages]
    expected = [answers.rendered(known[first:last]) for first, last in ends]
    rows = rows_of(tmp_path / "traces")
    assert [row["token_ids"][: row["loss_mask"].index(1)] for row in rows] == expected
    assert [row["turn"] for row in rows] == list(range(len(ends)))
    assert done.manifest["splits"]["train"]["quarantined_by_reason"] == {"no-prompt": 1}


def test_rows_of_token_ids_and_instructions_are_prompts_too(tmp_path: Path, answers: AnswerServer) -> None:
    ids = answers.rendered([QUESTION])
    rows: list[Any] = [
        {"token_ids": [*ids, 40, 41, *ids, 42], "loss_mask": [0] * len(ids) + [1, 1] + [0] * len(ids) + [1]},
        {"instruction": "why?"},
        {"prompt": [QUESTION], "completion": "an answer that is not used"},
    ]
    generate(config(tmp_path, answers, rows))
    prompts = [row["token_ids"][: row["loss_mask"].index(1)] for row in rows_of(tmp_path / "traces")]
    assert prompts == [[*ids, 40, 41, *ids], ids, ids]


def test_rendering_settings_are_prepares(tmp_path: Path, answers: AnswerServer) -> None:
    generate(config(tmp_path, answers, [{"messages": [QUESTION]}], rendering=ChatSettings(system="Be kind.")))
    asked = answers.rendered([{"role": "system", "content": "Be kind."}, QUESTION])
    assert answers.requests[0]["prompt"] == asked


def test_equal_prompts_are_asked_once_and_written_each(tmp_path: Path, answers: AnswerServer) -> None:
    done = generate(config(tmp_path, answers, [{"prompt": "why?"}, {"prompt": "how?"}, {"prompt": "why?"}]))
    assert len(answers.requests) == done.answered == 2
    first, _, last = rows_of(tmp_path / "traces")
    assert first["token_ids"] == last["token_ids"]
    assert first["source"] != last["source"]
    assert done.manifest["splits"]["train"]["equal_to_earlier"] == 1


def test_answers_that_were_cut_off_are_flagged_or_dropped(tmp_path: Path, answers: AnswerServer) -> None:
    answers.finish = {"finish_reason": "length", "stop_reason": None}
    kept = generate(config(tmp_path, answers, questions(3)))
    rows = rows_of(tmp_path / "traces")
    assert {row["finish_reason"] for row in rows} == {"length"}
    assert all(row["token_ids"][-1] != answers.eos for row in rows)
    assert kept.manifest["splits"]["train"]["truncated"] == 3
    with pytest.raises(InputError, match=r"all 3 were cut off, which --drop-truncated leaves out"):
        generate(config(tmp_path, answers, [], output="dropped", drop_truncated=True))
    assert not (tmp_path / "dropped").exists()


@pytest.mark.parametrize(
    ("finish", "last"),
    [
        ({"finish_reason": "stop", "stop_reason": 1}, 1),
        ({"finish_reason": "stop", "matched_stop": 1}, 1),
        ({"finish_reason": "stop", "stop_reason": None}, None),
        ({"finish_reason": "stop"}, None),
    ],
)
def test_a_stop_token_that_the_server_cut_off_is_put_back(
    tmp_path: Path, answers: AnswerServer, finish: dict[str, Any], last: int | None
) -> None:
    answers.finish = finish
    answers.change = lambda choice: choice["token_ids"].pop()
    generate(config(tmp_path, answers, questions(1)))
    assert rows_of(tmp_path / "traces")[0]["token_ids"][-1] == (answers.eos if last is None else last)


def test_without_ids_text_is_tokenised_and_drift_is_quarantined(tmp_path: Path, answers: AnswerServer) -> None:
    exact = generate(config(tmp_path, answers, questions(8), output="exact"))
    assert exact.manifest["splits"]["train"]["retokenised"] == 0
    answers.returns_ids = False
    done = generate(config(tmp_path, answers, [], output="text"))
    assert done.manifest["splits"]["train"]["retokenised"] == 8
    ours, theirs = rows_of(tmp_path / "text"), rows_of(tmp_path / "exact")
    assert [row["token_ids"] for row in ours] == [row["token_ids"] for row in theirs]


DRIFTS = {
    "U+FFFD": "an emoji that was cut: \ufffd",
    "tokens, as the server counts": "The quick brown fox jumps over the lazy dog, which the server counts otherwise",
}


@pytest.mark.parametrize("found", DRIFTS)
def test_each_drift_is_noticed(tmp_path: Path, answers: AnswerServer, found: str) -> None:
    answers.returns_ids = False
    answers.change = lambda choice: choice.update(text=DRIFTS[found]) if len(answers.requests) == 1 else None
    done = generate(config(tmp_path, answers, questions(3), concurrency=1))
    assert done.manifest["splits"]["train"]["quarantined_by_reason"] == {"drift": 1}
    (record,) = rejected(tmp_path / "traces")
    assert found in record["expected"]
    assert record["line"] == 1
    assert len(rows_of(tmp_path / "traces")) == 2


def test_a_token_across_the_border_of_prompt_and_answer_is_drift(tmp_path: Path, answers: AnswerServer) -> None:
    """The prompt ends with half of what the tokenizer would merge: the model can't have been given that."""
    whole = answers.backend.encode("The quick", add_special_tokens=False).ids
    pieces = [answers.backend.token_to_id(piece) for piece in ("T", "h")]
    assert whole[0] not in pieces
    answers.returns_ids = False
    answers.change = lambda choice: choice.update(text="e quick")
    with pytest.raises(InputError, match="reach from the prompt into the answer"):
        generate(config(tmp_path, answers, [{"token_ids": pieces, "loss_mask": [0, 0]}]))


def test_a_tokenizer_that_does_not_give_its_text_back_is_drift(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Normalising tokenizers read another text than they write; with ids from the server nothing is lost."""
    import shutil

    from tokenizers import Tokenizer, normalizers

    shutil.copytree(tokenizer_dir, tmp_path / "lower")
    backend = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    backend.normalizer = normalizers.Lowercase()
    backend.save(str(tmp_path / "lower" / "tokenizer.json"))
    with answer_server(tmp_path / "lower", returns_ids=False) as server:
        server.text = lambda prompt, payload: "PARIS"  # type: ignore[method-assign]
        with pytest.raises(InputError, match=r"all set aside \(\{'drift': 2\}\).*decode"):
            generate(config(tmp_path, server, questions(2)))
        server.returns_ids = True
        assert generate(config(tmp_path, server, [])).answered == 2


def test_a_prompt_that_the_server_changed_is_quarantined(tmp_path: Path, answers: AnswerServer) -> None:
    answers.change = lambda choice: choice["prompt_token_ids"].insert(0, 5) if len(answers.requests) == 2 else None
    generate(config(tmp_path, answers, questions(3), concurrency=1))
    (record,) = rejected(tmp_path / "traces")
    assert (record["reason"], record["line"]) == ("prompt-differs", 2)


def test_chat_completions(tmp_path: Path, answers: AnswerServer) -> None:
    generate(config(tmp_path, answers, questions(4), output="plain"))
    answers.requests.clear()
    generate(config(tmp_path, answers, [], output="ids", chat=True))
    answers.returns_ids = False
    generate(config(tmp_path, answers, [], output="text", chat=True))
    assert all(asked["messages"] for asked in answers.requests)
    for name in ("ids", "text"):
        assert (tmp_path / name / "train" / ROWS).read_bytes() == (tmp_path / "plain" / "train" / ROWS).read_bytes()
    answers.change = lambda choice: choice["message"].update(reasoning_content="because")
    with pytest.raises(InputError, match="answer-taken-apart"):
        generate(config(tmp_path, answers, [], output="parsed", chat=True))


def test_a_server_that_knows_no_more_than_openais_fields(tmp_path: Path, answers: AnswerServer) -> None:
    answers.takes_more, answers.returns_ids = False, False
    done = generate(config(tmp_path, answers, questions(3)))
    assert done.manifest["splits"]["train"]["retokenised"] == 3
    assert not any("top_k" in asked for asked in answers.requests)
    with pytest.raises(InputError, match="unknown field return_token_ids"):
        generate(config(tmp_path, answers, [], output="k", temperature=1.0, top_k=5))


def test_prompts_that_do_not_fit_are_quarantined_before_they_are_asked(tmp_path: Path, answers: AnswerServer) -> None:
    answers.models = [{"id": MODEL, "max_model_len": 100}]
    done = generate(config(tmp_path, answers, [{"prompt": "why?"}, {"prompt": "why? " * 60}]))
    assert done.manifest["splits"]["train"]["quarantined_by_reason"] == {"prompt-too-long": 1}
    assert len(answers.requests) == 1
    assert "at most 36 tokens" in rejected(tmp_path / "traces")[0]["expected"]


def test_the_model_is_checked_before_anything_runs(tmp_path: Path, answers: AnswerServer) -> None:
    with pytest.raises(InputError, match=r"--model other: expected one of the server's models, found \['stand-in'\]"):
        generate(config(tmp_path, answers, questions(2), model="other"))
    answers.models = [{"id": MODEL}, {"id": "second"}]
    with pytest.raises(InputError, match="expected the name of one of the server's models"):
        generate(config(tmp_path, answers, []))
    answers.answered_by = "another"
    with pytest.raises(ManifestMismatchError, match="expected answers of model 'stand-in', found one of 'another'"):
        generate(config(tmp_path, answers, [], model=MODEL))
    assert not answers.requests  # it was found out by the first request, which tries the server


def test_the_same_job_is_not_run_again_and_another_is_refused(tmp_path: Path, answers: AnswerServer) -> None:
    settings = config(tmp_path, answers, questions(3))
    first = generate(settings)
    asked = len(answers.requests)
    again = generate(settings)
    assert again.reused
    assert again.manifest == first.manifest
    assert len(answers.requests) == asked
    with pytest.raises(InputError, match=r"--max-new-tokens: 64 there, 65 here; choose another path"):
        generate(config(tmp_path, answers, [], max_new_tokens=65))
    other = generate(config(tmp_path, answers, [], max_new_tokens=65, overwrite=True))
    assert not other.reused
    assert other.answered == 3
    (tmp_path / "traces" / MANIFEST).write_text("{}")
    with pytest.raises(InputError, match="found something else or damaged traces"):
        generate(settings)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prompts.jsonl", "traces"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"server": "ftp://x"}, "--server: expected a URL"),
        ({"server": None}, "found neither"),
        ({"verifier": Path("v")}, "found both"),
        ({"tokenizer": None}, "--tokenizer: expected"),
        ({"samples": 2}, "--samples: expected 1 at --temperature 0"),
        ({"top_p": 0.0}, "--top-p: expected more than 0"),
        ({"temperature": -1.0}, "--temperature: expected at least 0"),
        ({"temperature": float("nan")}, "--temperature: expected a finite number"),
        ({"continue_from": "last"}, "--continue-from: expected one of last-user"),
        ({"splits": {}}, "expected at least one NAME=INPUT"),
        ({"splits": {"quarantine": [Path("x")]}}, "expected other names of splits"),
        ({"server": None, "verifier": Path("v"), "chat": True}, "--chat: expected a --server beside it"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], said: str) -> None:
    right: dict[str, Any] = {
        "output": Path("o"), "splits": {"train": [Path("x")]}, "server": "http://x/v1", "tokenizer": Path("t"),
    }  # fmt: skip
    with pytest.raises(InputError, match=said):
        GenerateConfig(**{**right, **wrong})


def test_ids_are_what_the_server_says_whatever_its_text_is(tmp_path: Path, answers: AnswerServer) -> None:
    """Where the model wrote ids that its text does not tokenise to, the row has the ids."""
    letters = [answers.backend.token_to_id(letter) for letter in "The"]
    answers.change = lambda choice: choice.update(text="The", token_ids=[*letters, answers.eos])
    generate(config(tmp_path, answers, questions(1)))
    (row,) = rows_of(tmp_path / "traces")
    assert row["token_ids"][-4:-1] == letters
    assert answers.backend.encode("The", add_special_tokens=False).ids != letters  # the negative control
    assert np.sum(row["loss_mask"]) == 4
