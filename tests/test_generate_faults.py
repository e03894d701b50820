"""Servers that fail for a time, for ever, or for one row; and jobs that are killed and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from draftcache.capture.generate import http_client
from draftcache.capture.generate.config import GenerateConfig
from draftcache.capture.generate.job import generate
from draftcache.capture.generate.traces import MANIFEST, QUARANTINE, ROWS
from draftcache.capture.generate.unfinished import unfinished_path
from draftcache.store.common.errors import InputError, ManifestMismatchError
from draftcache.tools.cli import main
from support.answer_server import AnswerServer, answer_server
from support.processes import ONE_THREAD, wait_for


@pytest.fixture
def answers(tokenizer_dir: Path) -> Iterator[AnswerServer]:
    with answer_server(tokenizer_dir) as running:
        yield running


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "FIRST_WAIT_SECONDS", 0.01)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows: list[dict[str, Any]] = [{"id": number, "prompt": f"what is {number % 30}?"} for number in range(40)]
    rows[11] = {"messages": [{"role": "system", "content": "nothing is asked"}]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "broken\n", encoding="utf-8")
    return path


def config(prompts: Path, server: AnswerServer, output: str = "traces", **more: Any) -> GenerateConfig:
    settings = {"max_new_tokens": 64, "concurrency": 8, "progress": False, "retries": 3, **more}
    return GenerateConfig(
        tokenizer=server.tokenizer, output=prompts.parent / output, splits={"a": [prompts], "b": [prompts]},
        server=server.url, **settings,
    )  # fmt: skip


def words(prompts: Path, server: AnswerServer, output: str = "traces") -> list[str]:
    """The same job as a command."""
    return [
        "generate", "--tokenizer", str(server.tokenizer), "--output", str(prompts.parent / output), "--server",
        server.url, "--max-new-tokens", "64", "--concurrency", "2", "--retries", "1", f"a={prompts}", f"b={prompts}",
    ]  # fmt: skip


def rejected(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / QUARANTINE / "a.jsonl").read_bytes().splitlines()]


def all_bytes(output: Path) -> dict[str, bytes]:
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


@pytest.mark.parametrize("fault", ["503", "429", "reset", "truncated", "garbage", "empty", "hang"])
def test_a_fault_that_passes_leaves_no_trace(prompts: Path, answers: AnswerServer, fault: str) -> None:
    whole = generate(config(prompts, answers, "whole"))
    answers.requests.clear()
    answers.fault = lambda number, payload: fault if number in (3, 4, 9) else None
    # On a busy machine other answers take their time too.
    flaky = generate(config(prompts, answers, "flaky", timeout_seconds=2.0 if fault == "hang" else 30.0))
    assert flaky.retried == 3
    assert whole.retried == 0
    assert all_bytes(prompts.parent / "flaky") == all_bytes(prompts.parent / "whole")


@pytest.mark.parametrize(
    ("fault", "reason", "found"),
    [
        ("400", "refused-by-server", "status 400: fault 400 on purpose"),
        ("422", "refused-by-server", "status 422: fault 422 on purpose"),
        ("truncated", "bad-response", "3 times: a body that breaks off"),
        ("garbage", "bad-response", "3 times: a body that is no JSON"),
        ("empty", "bad-response", "3 times: expected choices"),
    ],
)
def test_a_fault_of_one_row_is_that_rows(
    prompts: Path, answers: AnswerServer, fault: str, reason: str, found: str
) -> None:
    wrong = answers.rendered([{"role": "user", "content": "what is 5?"}])
    answers.fault = lambda number, payload: fault if payload.get("prompt") == wrong else None
    done = generate(config(prompts, answers, retries=2))
    assert done.manifest["splits"]["a"]["quarantined_by_reason"] == {"malformed-json": 1, "no-prompt": 1, reason: 2}
    records = rejected(prompts.parent / "traces")
    assert [record["line"] for record in records] == [6, 12, 36, 41]
    assert found in records[0]["found"]


@pytest.mark.parametrize(("status", "said"), [("401", "OPENAI_API_KEY"), ("404", "is the URL right")])
def test_a_refusal_of_all_ends_the_job(prompts: Path, answers: AnswerServer, status: str, said: str) -> None:
    answers.fault = lambda number, payload: status if number > 5 else None
    with pytest.raises(InputError, match=rf"found {status} \(fault {status} on purpose\).*{said}"):
        generate(config(prompts, answers))


def test_another_model_in_the_middle_ends_the_job(prompts: Path, answers: AnswerServer) -> None:
    def swap(number: int, payload: dict[str, Any]) -> None:
        answers.answered_by = "another" if number > 5 else answers.answered_by

    answers.fault = swap
    with pytest.raises(ManifestMismatchError, match="found one of 'another'"):
        generate(config(prompts, answers))


def test_a_server_that_dies_ends_the_job_and_the_same_command_goes_on(
    prompts: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with answer_server(tokenizer_dir) as whole:
        assert main(words(prompts, whole, "whole")) == 1  # rows were quarantined
    with answer_server(tokenizer_dir, fault=lambda number, payload: "reset" if number > 12 else None) as dying:
        assert main(words(prompts, dying)) == 3
        said = capsys.readouterr().err
        assert "2 times; what was answered is kept: run the same command again once the server is back" in said
    assert not (prompts.parent / "traces").exists()
    assert main(words(prompts, dying)) == 3  # nobody is there any more
    assert "ConnectError" in capsys.readouterr().err
    with answer_server(tokenizer_dir) as back:  # at another port: where a server is does not count
        assert main(words(prompts, back)) == 1
        assert len(back.requests) < 29 - 8
    assert all_bytes(prompts.parent / "traces") == all_bytes(prompts.parent / "whole")
    assert "an earlier run left" in capsys.readouterr().err


def test_a_killed_job_goes_on_and_makes_the_same_bytes(prompts: Path, answers: AnswerServer) -> None:
    generate(config(prompts, answers, "whole"))
    answers.requests.clear()
    answers.seconds = 0.05
    left = unfinished_path(prompts.parent / "traces")
    with subprocess.Popen(
        [sys.executable, "-m", "draftcache.tools.cli", *words(prompts, answers)],
        env={**os.environ, **ONE_THREAD}, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        wait_for(lambda: len(answers.requests) > 10)
        process.send_signal(signal.SIGKILL)
    asked = len(answers.requests)
    assert left.is_dir()
    assert not (prompts.parent / "traces").exists()
    (journal,) = left.glob("answers-*.jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    assert 5 < len(lines) < 29
    # A power cut tears the last line, and a bad disk changes another one: both samples are asked for again.
    lines[2] = lines[2].replace(b'"stop"', b'"sotp"')
    journal.write_bytes(b"".join(lines)[:-7])
    answers.seconds = 0.0
    with pytest.raises(InputError, match=r"another job's: --seed|another job's: --max-new-tokens: 64 there, 65 here"):
        generate(config(prompts, answers, max_new_tokens=65))
    assert generate(config(prompts, answers)).answered == 29 - (len(lines) - 2)
    assert len(answers.requests) - asked == 29 - (len(lines) - 2)
    assert all_bytes(prompts.parent / "traces") == all_bytes(prompts.parent / "whole")
    assert not left.exists()


def test_what_another_job_left_is_discarded_on_request(prompts: Path, answers: AnswerServer) -> None:
    answers.fault = lambda number, payload: "401" if number > 20 else None
    with pytest.raises(InputError, match="401"):
        generate(config(prompts, answers))
    answers.fault = lambda number, payload: None
    done = generate(config(prompts, answers, max_new_tokens=65, overwrite=True))
    assert done.answered == 29


def test_sampled_answers_are_the_same_after_a_kill(prompts: Path, answers: AnswerServer) -> None:
    sampled = {"temperature": 1.0, "samples": 2}
    generate(config(prompts, answers, "whole", **sampled))
    answers.requests.clear()
    answers.fault = lambda number, payload: "401" if number > 20 else None
    with pytest.raises(InputError, match="401"):
        generate(config(prompts, answers, **sampled))
    answers.fault = lambda number, payload: None
    assert 29 < generate(config(prompts, answers, **sampled)).answered < 58
    assert all_bytes(prompts.parent / "traces") == all_bytes(prompts.parent / "whole")
    generate(config(prompts, answers, "other", seed=1, **sampled))
    other, whole = ((prompts.parent / name / "a" / ROWS).read_bytes() for name in ("other", "whole"))
    assert other != whole  # the negative control: seeds decide


def test_no_more_requests_than_asked_for_and_no_more_rows_than_needed(prompts: Path, answers: AnswerServer) -> None:
    busy, most = [0], [0]
    body = answers.body

    def counted(payload: dict[str, Any]) -> dict[str, Any]:
        busy[0] += 1
        most[0] = max(most[0], busy[0])
        time.sleep(0.02)
        busy[0] -= 1
        return body(payload)

    answers.body = counted  # type: ignore[method-assign]
    generate(config(prompts, answers, concurrency=3))
    assert most[0] == 3


def test_two_jobs_at_once_are_refused(prompts: Path, answers: AnswerServer) -> None:
    from draftcache.capture.prepare.token_dataset_writer import exclusive

    with (
        exclusive(prompts.parent / "traces", "generate"),
        pytest.raises(InputError, match="found another generate at work there"),
    ):
        generate(config(prompts, answers))


def test_the_manifest_tells_a_changed_file_by_its_size(prompts: Path, answers: AnswerServer) -> None:
    generate(config(prompts, answers))
    rows = prompts.parent / "traces" / "a" / ROWS
    rows.write_bytes(rows.read_bytes()[:-1])
    with pytest.raises(InputError, match="damaged traces"):
        generate(config(prompts, answers))
    assert json.loads((prompts.parent / "traces" / MANIFEST).read_bytes())["format"] == "draftcache-traces"
