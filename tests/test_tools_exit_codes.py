"""How commands end: 0 done, 1 damage, 2 refused, 3 failed, 130 interrupted; errors in one line, traces on request."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from draftcache.store.common import errors
from draftcache.store.common.device import choose_device
from draftcache.store.common.failures import describe_failure, exit_code_of
from draftcache.store.common.stopping import Stopped
from draftcache.tools.cli import COMMANDS, main
from support.log_lines import without_times
from support.paths import DEMO
from support.processes import ONE_THREAD
from support.synthetic import write_store
from support.wrong_words import words_naming

CLI = [sys.executable, "-m", "draftcache.tools.cli"]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *map(str, arguments)], capture_output=True, text=True, env=ONE_THREAD)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InputError("x"), 2),
        (errors.ShardDamagedError("x"), 2),
        (errors.StorageError("x"), 3),
        (errors.RankError("x"), 3),
        (errors.WorkerError("x"), 3),
        (FileNotFoundError(2, "No such file or directory", "/a"), 2),
        (PermissionError(13, "Permission denied", "/a"), 2),
        (OSError(28, "No space left on device", "/a"), 3),
        (MemoryError(), 3),
        (SafetensorError("x"), 3),
        (TypeError("x"), 3),
        (RuntimeError("CUDA error: device lost"), 3),
        (BrokenPipeError(), 141),
        (KeyboardInterrupt(), 130),
        (Stopped(signal.SIGTERM), 143),
        (Stopped(signal.SIGINT), 130),
    ],
)
def test_each_kind_of_error_has_its_code_and_one_line(error: BaseException, code: int) -> None:
    assert exit_code_of(error) == code
    if not isinstance(error, BrokenPipeError | KeyboardInterrupt):
        assert describe_failure(error)
        assert "\n" not in describe_failure(error)


def test_an_unexpected_error_is_one_line_and_a_trace_with_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise TypeError("a bug\nover two lines")

    monkeypatch.setattr("draftcache.store.verify.verify_store", broken)
    monkeypatch.delenv("DRAFTCACHE_DEBUG", raising=False)
    monkeypatch.setitem(os.environ, "DRAFTCACHE_DEBUG", "")  # restored after --debug has set it
    assert main(["verify", "somewhere"]) == 3
    shown = without_times(capsys.readouterr().err)
    (line,) = [line for line in shown.splitlines() if "error" in line]
    assert line.startswith("draftcache verify: error: internal error, TypeError: a bug over two lines (run with")
    assert "Traceback" not in shown
    assert main(["verify", "somewhere", "--debug"]) == 3
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_ends_in_one_line_with_the_remedy(tmp_path: Path) -> None:
    """Standard output is the device that is full: the first flush fails as on a full disk."""
    write_store(tmp_path / "s")
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*CLI, "inspect", str(tmp_path / "s")], stdout=full, stderr=subprocess.PIPE, text=True, env=ONE_THREAD
        )
    assert done.returncode == 3
    assert "No space left on device; free some space" in done.stderr.splitlines()[0]


def test_a_reader_that_leaves_is_no_error(tmp_path: Path) -> None:
    write_store(tmp_path / "s")
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*CLI, "inspect", str(tmp_path / "s")], stdout=writing, stderr=subprocess.PIPE, text=True, env=ONE_THREAD
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", "--learning-rate", "nan"], "--learning-rate: expected a finite number, found 'nan'"),
        (["train", "--learning-rate", "1e999"], "--learning-rate: expected a finite number, found '1e999'"),
        (["capture", "--buffer-gb", "inf"], "--buffer-gb: expected a finite number, found 'inf'"),
        (["size", "--tokens", "inf"], "--tokens: expected a finite number, found 'inf'"),
        (["size", "--tokens", "-5"], "--tokens: expected a whole number of at least 0, found '-5'"),
        (["size", "--disk-gb-s", "-inf"], "--disk-gb-s: expected a finite number, found '-inf'"),
        (["probe", "--tolerance", "nan"], "--tolerance: expected a finite number, found 'nan'"),
    ],
)
def test_numbers_that_are_none_are_refused(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([arguments[0], f"{arguments[1]}={arguments[2]}"])
    assert ended.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:99", "cuda:x", ""])
def test_devices_that_are_not_there_are_refused_by_name(device: str) -> None:
    with pytest.raises(errors.InputError, match="--device"):
        choose_device(device)


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "demo"])
def test_no_command_has_a_traceback_for_paths_that_are_no_data(name: str, tmp_path: Path) -> None:
    """Each path flag names a text file, and each command refuses it with code 2 or 1, in words."""
    text = tmp_path / "text"
    text.write_text("neither JSON nor a directory")
    flags = words_naming(text, tmp_path / "out")[name]
    if name == "probe":
        flags = ["--verifier", DEMO, "--text", text, "--output", text / "out", "--layers", "0,1"]
    done = run(name, *flags)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert f"{text}" in done.stderr  # not a complaint about the flags
    assert "usage:" not in done.stderr
