"""Watching real processes: waiting for what they do, and finding the workers that they started."""

from __future__ import annotations

import contextlib
import os
import pty
import subprocess
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Ray's gRPC would ask a proxy for addresses of this very machine.
ONE_THREAD = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")} | {
    "OMP_NUM_THREADS": "1"
}


def wait_for(what: Callable[[], Any], seconds: float = 90.0) -> None:
    """Wait until `what()` is true, and fail when that takes longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def on_terminal(command: list[str], **more: Any) -> tuple[int, bytes]:
    """Run a command whose stderr is a terminal of 100 columns. Returns its exit code and what it wrote there."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, 100))
    with subprocess.Popen(command, stderr=theirs, **more) as process:
        os.close(theirs)
        written = b""
        try:
            while part := os.read(ours, 4096):
                written += part
        except OSError:  # how Linux says that the other end is closed
            pass
        os.close(ours)
    return process.returncode, written


def children(pid: int) -> list[int]:
    """Find the worker processes of process `pid`; multiprocessing's resource tracker is none of them."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"spawn_main" in stat.with_name("cmdline").read_bytes():
                found.append(int(stat.parent.name))
    return found
