"""Each line of a log begins with the time: of the command itself, of its threads and its worker processes."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from draftcache.store.common.log_times import TimedLines, now, time_worker_lines, times_on_stderr
from support.capture_jobs import config, flags, small_dataset
from support.log_lines import TIME, without_times
from support.paths import ROOT
from support.processes import ONE_THREAD, children, on_terminal, wait_for
from support.synthetic import write_store
from support.tiny_models import save_model
from support.watched_checks import WatchedChecks

CLI = [sys.executable, "-m", "draftcache.tools.cli"]


def test_the_time_is_utc_to_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.gmtime", lambda: (2026, 11, 26, 5, 29, 12, 3, 330, 0))
    assert now() == "2026-11-26T05:29:12Z "


@pytest.mark.parametrize(
    ("texts", "lines"),
    [
        (["one\n"], "one\n"),
        (["one", " and", "\n", "two\nthree\nfo", "ur\n"], "one and\ntwo\nthree\nfour\n"),
        (["\n", "a\n\n"], "\na\n\n"),
        (["", "a", "", "\n"], "a\n"),
        (["windows\r\n"], "windows\n"),
        (["\rbar 1%", "\rbar 50%", "\rbar 100%", "\n"], "bar 100%\n"),
        (["\rbar 1%", "\rbar 50%", "a message", "\n"], "bar 50%\na message\n"),
        (["\rbar 1%", "\r      \r", "a message\n"], "a message\n"),  # a bar that was wiped away
    ],
)
def test_lines_are_whole_whatever_the_writes(texts: list[str], lines: str) -> None:
    inner = io.StringIO()
    stream = TimedLines(inner)
    for text in texts:
        assert stream.write(text) == len(text)
    assert without_times(inner.getvalue()) == lines


def test_flush_ends_a_line_and_leaves_one_that_moves() -> None:
    inner = io.StringIO()
    stream = TimedLines(inner)
    stream.write("working ...")
    stream.flush()
    stream.writelines(["\rbar 1%"])
    stream.flush()
    assert without_times(inner.getvalue()) == "working ...\n"
    stream.finish()
    assert without_times(inner.getvalue()) == "working ...\nbar 1%\n"


def test_lines_of_threads_stay_apart() -> None:
    inner = io.StringIO()
    stream = TimedLines(inner)
    start = threading.Barrier(8)

    def talk(number: int) -> None:
        start.wait()
        for count in range(200):
            print("thread", number, "says", count, file=stream)  # seven writes

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = without_times(inner.getvalue()).splitlines()
    assert sorted(said) == sorted(f"thread {number} says {count}" for number in range(8) for count in range(200))


def test_each_line_is_passed_on_at_once() -> None:
    class Unflushed(io.StringIO):
        flushed = 0

        def flush(self) -> None:
            self.flushed = len(self.getvalue())

    inner = Unflushed()
    TimedLines(inner).write("last words\n")
    assert inner.flushed == len(inner.getvalue()) > 0


def test_it_is_put_on_once_and_taken_off(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stderr
    with times_on_stderr():
        with times_on_stderr():  # as where the demo runs a command
            print("inner", file=sys.stderr)
        print("outer", end="", file=sys.stderr)
        assert os.environ["DRAFTCACHE_LOG_TIMES"] == "1"
    assert sys.stderr is before
    assert "DRAFTCACHE_LOG_TIMES" not in os.environ
    assert without_times(capsys.readouterr().err) == "inner\nouter\n"
    time_worker_lines()  # no command runs
    assert sys.stderr is before


def test_every_line_of_a_command_has_a_time(tmp_path: Path) -> None:
    write_store(tmp_path / "s")
    for words, last in (
        (["verify", str(tmp_path / "s")], "verify: 100%"),
        (["inspect", str(tmp_path / "none")], "draftcache inspect: error: "),
        (["inspect", str(tmp_path / "none"), "--debug"], "StoreNotFoundError: "),
        (["inspect"], "draftcache inspect: error: the following arguments are required"),
        (["nonsense"], "draftcache: error: argument COMMAND: invalid choice"),
    ):
        done = subprocess.run([*CLI, *words], capture_output=True, text=True, env=ONE_THREAD)
        assert last in without_times(done.stderr), words
        assert not TIME.search(done.stdout)


def test_a_terminal_gets_no_times(tmp_path: Path) -> None:
    code, written = on_terminal([*CLI, "inspect", str(tmp_path)], env=ONE_THREAD)
    assert code == 2
    assert written.startswith(b"draftcache inspect: error: ")


def test_the_library_puts_no_times(tmp_path: Path) -> None:
    write_store(tmp_path / "s")
    script = f"""
import sys, draftcache
from draftcache.store.common.progress import progress_bar
before = sys.stderr
with progress_bar(desc="mine") as bar:
    draftcache.verify_store({str(tmp_path / "s")!r}, progress=bar.update)
assert sys.stderr is before
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, env=ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("mine: ") for line in done.stderr.splitlines())


def test_what_a_killed_run_said_is_there(tmp_path: Path) -> None:
    write_store(tmp_path / "s")
    watched = WatchedChecks(tmp_path / "w")
    with watched.start("verify", tmp_path / "s", seconds=30) as process:
        wait_for(watched.checked)
        process.kill()
        err = process.communicate()[1]
    assert process.returncode == -signal.SIGKILL
    assert without_times(err).splitlines()[-1].startswith("verify:   0%")


WORKERS_SPEAK = """
import sys
from draftcache.capture.job.worker_job import CaptureJob
work = CaptureJob.run_worker
def speak(*arguments):
    print("a worker speaks", file=sys.stderr)
    return work(*arguments)
CaptureJob.run_worker = speak
"""


@pytest.mark.slow
def test_worker_processes_put_times_too(tmp_path: Path, tokenizer_dir: Path) -> None:
    """What a worker of capture writes, and what the command says of one that was killed."""
    (tmp_path / "sitecustomize.py").write_text(WORKERS_SPEAK)  # Python imports it first, in workers too
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    verifier, dataset = save_model(tmp_path / "v", "llama"), small_dataset(tmp_path, tokenizer_dir)
    command = [*CLI, "capture", *flags(config(verifier, dataset, tmp_path / "s")), "--workers", "2"]
    environment = ONE_THREAD | {"PYTHONPATH": path}
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        wait_for(lambda: len(children(process.pid)) == 2)
        os.kill(children(process.pid)[0], signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    said = without_times(err)
    assert "capture: 100%" in said
    assert "a worker speaks" in said.splitlines()
    assert "ended early: exit code -9" in said
