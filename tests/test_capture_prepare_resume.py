"""A killed prepare goes on from finished chunks, and makes what an undisturbed one makes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from draftcache.capture.prepare import chunks as prepare_chunks
from draftcache.capture.prepare import job as prepare_job
from draftcache.capture.prepare.chat.settings import ChatSettings
from draftcache.capture.prepare.job import PrepareConfig, prepare
from draftcache.capture.prepare.resuming import PROGRESS
from support.processes import ONE_THREAD, wait_for

ROWS = 240
KILLED = """
import os, signal, sys
from pathlib import Path
from draftcache.capture.prepare import chunks, job
from draftcache.capture.prepare.chunks import ChunkWorker
chunks.CHUNK_BYTES, job.SAVE_SECONDS = 600, 0.0
directory, stop, tokenizer = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
run, done = ChunkWorker.run, []
def counted(self, chunk):
    done.append(chunk)
    if len(done) > stop:
        os.kill(os.getpid(), signal.SIGKILL)
    return run(self, chunk)
ChunkWorker.run = counted
job.prepare(job.PrepareConfig(
    tokenizer=tokenizer, output=directory / "out", splits={"a": [directory / "a.jsonl"], "b": [directory / "b.jsonl"]},
    held_out={}, workers=1, draft_vocab_size=50, drop_duplicates=True,
))
print("chunks", len(done))
"""


def row(number: int) -> dict[str, Any]:
    if number % 17 == 5:
        return {"messages": [{"role": "user", "content": f"only a question {number}"}]}
    answer = {
        "role": "assistant",
        "content": f"answer {number % 50 if number < 200 else number}",
        "reasoning": "because",
    }
    return {"messages": [{"role": "user", "content": "why?"}, answer]}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name, first in (("a", 0), ("b", 30)):
        rows = [json.dumps(row(first + number)) for number in range(ROWS)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    return tmp_path


def config(directory: Path, tokenizer: Path, output: str = "out", **settings: Any) -> PrepareConfig:
    settings = {"workers": 1, "draft_vocab_size": 50, "drop_duplicates": True, "progress": False, **settings}
    files = {"a": [directory / "a.jsonl"], "b": [directory / "b.jsonl"]}
    return PrepareConfig(tokenizer=tokenizer, output=directory / output, splits=files, held_out={}, **settings)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_chunks, "CHUNK_BYTES", 600)
    monkeypatch.setattr(prepare_job, "SAVE_SECONDS", 0.0)


def run_until(directory: Path, tokenizer: Path, stop: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", KILLED, str(directory), str(stop), str(tokenizer)]
    environment = {**os.environ, **ONE_THREAD}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def leftovers(directory: Path) -> list[Path]:
    return sorted(directory.glob(".out.*.partial"))


def same_files(directory: Path, one: str, other: str) -> None:
    def of(name: str) -> dict[str, bytes]:
        root = directory / name
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    assert of(one) == of(other)


def test_a_killed_job_goes_on_and_makes_the_same(directory: Path, tokenizer_dir: Path) -> None:
    whole = prepare(config(directory, tokenizer_dir, "whole")).manifest
    for stop in (9, 40):
        killed = run_until(directory, tokenizer_dir, stop)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert len(leftovers(directory)) == 1
    done = run_until(directory, tokenizer_dir, 10_000)
    assert done.returncode == 0, done.stderr
    assert "an earlier run left" in done.stderr
    assert 0 < int(done.stdout.split()[1]) < 60
    same_files(directory, "out", "whole")
    assert not leftovers(directory)
    assert whole["notes"]
    assert whole["splits"]["a"]["dropped_duplicates"]
    assert whole["splits"]["b"]["quarantined_rows"] > 5


LEFT = [f"a/{name}" for name in ("token_ids.npy", "loss_mask.npy", "conversations.npy", "quarantine.jsonl")]


@pytest.mark.parametrize(
    ("name", "cut"),
    [*(pytest.param(name, False, marks=pytest.mark.slow) for name in LEFT), (PROGRESS, False), (LEFT[0], True)],
)
def test_damaged_leftovers_are_not_gone_on_from(
    directory: Path, tokenizer_dir: Path, name: str, cut: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(config(directory, tokenizer_dir, "whole"))
    assert run_until(directory, tokenizer_dir, 30).returncode == -signal.SIGKILL
    (left,) = leftovers(directory)
    data = bytearray((left / name).read_bytes())
    at = data.rindex(b'"line"') if name.endswith("jsonl") else (len(data) // 2 if name.endswith("npy") else 30)
    data[at] ^= 0x01
    (left / name).write_bytes(data[: len(data) // 4] if cut else data)
    prepare(config(directory, tokenizer_dir, progress=True))
    assert "an earlier run left" not in capsys.readouterr().err
    same_files(directory, "out", "whole")


def test_another_job_does_not_go_on_from_it(directory: Path, tokenizer_dir: Path) -> None:
    assert run_until(directory, tokenizer_dir, 20).returncode == -signal.SIGKILL
    other = config(directory, tokenizer_dir, chat=ChatSettings(system="Be kind."))
    prepare(other)
    assert not leftovers(directory)
    prepare(config(directory, tokenizer_dir, "whole", chat=ChatSettings(system="Be kind.")))
    same_files(directory, "out", "whole")


def test_a_job_that_may_live_keeps_what_it_has(directory: Path, tokenizer_dir: Path) -> None:
    assert run_until(directory, tokenizer_dir, 20).returncode == -signal.SIGKILL
    (left,) = leftovers(directory)
    with subprocess.Popen(["sleep", "100"]) as living:
        moved = left.with_name(left.name.replace(left.name.split("-")[-2], str(living.pid)))
        left.rename(moved)
        prepare(config(directory, tokenizer_dir))
        assert moved.is_dir()
        living.kill()


def test_an_interrupted_job_of_this_process_is_gone_on_with(
    directory: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare_chunks.ChunkWorker.run
    seen: list[Any] = []

    def interrupted(self: Any, chunk: Any) -> Any:
        seen.append(chunk)
        if len(seen) == 20:
            raise KeyboardInterrupt
        return run(self, chunk)

    monkeypatch.setattr(prepare_chunks.ChunkWorker, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(directory, tokenizer_dir))
    assert len(leftovers(directory)) == 1
    before = len(seen)
    prepare(config(directory, tokenizer_dir))
    again = len(seen) - before
    prepare(config(directory, tokenizer_dir, "whole"))
    assert len(seen) - before - again == again + 19
    same_files(directory, "out", "whole")


def test_a_refused_job_leaves_nothing(directory: Path, tokenizer_dir: Path) -> None:
    (directory / "b.jsonl").write_text("{}")
    with pytest.raises(Exception, match="split b: expected at least one usable row"):
        prepare(config(directory, tokenizer_dir))
    assert not leftovers(directory)


def test_what_workers_finished_is_kept_when_the_command_is_killed(directory: Path, tokenizer_dir: Path) -> None:
    """With worker processes, by the command itself, killed at some instant."""
    code = (
        "from draftcache.capture.prepare import chunks, job; chunks.CHUNK_BYTES, job.SAVE_SECONDS = 200, 0.0; "
        "from draftcache.tools.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    )
    words = ["prepare", f"a={directory / 'a.jsonl'}", f"b={directory / 'b.jsonl'}", "--tokenizer", str(tokenizer_dir)]
    words += ["--output", str(directory / "out"), "--workers", "2", "--draft-vocab-size", "50", "--drop-duplicates"]
    command = [sys.executable, "-c", code, *words]
    with subprocess.Popen(command, env={**os.environ, **ONE_THREAD}, stderr=subprocess.PIPE) as process:
        wait_for(lambda: bool(list(directory.glob(f".out.*.partial/{PROGRESS}"))))
        time.sleep(0.05)
        process.kill()
    done = subprocess.run(command, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr  # rows were quarantined
    assert "an earlier run left" in done.stderr
    prepare(config(directory, tokenizer_dir, "whole"))
    for split in ("a", "b"):
        assert (directory / "out" / split / "token_ids.npy").read_bytes() == (
            directory / "whole" / split / "token_ids.npy"
        ).read_bytes()
