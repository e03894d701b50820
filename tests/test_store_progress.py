"""Progress in a log file is readable lines, few of them; on a terminal it is one line that moves."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest
from tqdm import tqdm

from draftcache.store.common import progress
from support.paths import ROOT
from support.processes import on_terminal

SCRIPT = """
from draftcache.store.common.progress import progress_bar
with progress_bar(total=100, desc="work", unit="tok", unit_scale=True) as bar:
    for number in range(100):
        bar.set_postfix_str(f"step {number}", refresh=False)
        bar.update(1)
        if number == 50:
            bar.write("something was said", file=__import__("sys").stderr)
"""


def test_a_log_gets_the_first_line_and_the_last_and_what_is_said_between() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, check=True)
    first, said, last = ran.stderr.decode().splitlines()
    assert b"\r" not in ran.stderr
    assert (first[:11], said) == ("work:   0%|", "something was said")
    assert last.startswith("work: 100%|")
    assert "step 99" in last


def test_lines_come_as_often_as_they_should(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.0)
    with progress.progress_bar(total=5) as bar:
        for _ in range(5):
            bar.update(1)
            bar.update(0)  # nothing to say
    assert len(capsys.readouterr().err.splitlines()) == 7  # at first, five, at last


def test_a_total_that_is_known_later_is_counted_from_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was done before counts into the percentage, and not into the rate, which the time that is left follows."""
    with progress.progress_bar(desc="x") as bar:
        monkeypatch.setattr(bar, "_time", lambda: 1000.0)
        progress.set_total(bar, 100, done=60)
        monkeypatch.setattr(bar, "_time", lambda: 1010.0)
        bar.update(10)  # in 10 seconds: the last 30 take another 30
        assert bar.format_dict["elapsed"] == 10.0
    lines = capsys.readouterr().err.splitlines()
    assert lines[1].startswith("x:  60%")
    assert lines[-1].startswith("x:  70%")
    assert "00:10<00:30" in lines[-1]
    with progress.progress_bar(disable=True) as bar:
        progress.set_total(bar, 100)
    assert capsys.readouterr().err == ""


def test_a_bar_that_is_switched_off_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.progress_bar(total=5, disable=True) as bar:
        bar.update(1)
    assert capsys.readouterr().err == ""


def test_ctrl_c_while_a_bar_is_made_leaves_nothing_to_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest fails a test whose objects raise when they are collected."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tqdm, "__init__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        progress.progress_bar(total=5)
    gc.collect()


def test_a_terminal_gets_a_line_that_moves() -> None:
    code, written = on_terminal([sys.executable, "-c", SCRIPT], cwd=ROOT)
    assert code == 0
    assert written.count(b"\rwork:") >= 2
