"""Run a function in a forked process with a limit on its time and memory, so that a crash or hang of it is a result.

A fork starts with everything that this process has imported, which takes seconds for torch and transformers.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CRASHED = 99
"""The exit code of a function that raised."""
_POLL_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a forked process may take."""

    seconds: float
    memory_gb: float
    """Address space beside what this process has, in 2**30 bytes."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a forked process ended."""

    code: int | None
    """Its exit code, or minus the number of the signal that ended it; None where it ran out of time."""
    text: str
    """What it wrote to stdout and stderr."""
    seconds: float

    @property
    def last_line(self) -> str:
        """The last line of its text that is not empty."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        return lines[-1] if lines else ""


def run_limited(function: Callable[[], int], log: Path, limits: Limits) -> Ended:
    """Run `function` in a forked process, which ends with the exit code that it returns; its output goes to `log`."""
    started = time.monotonic()
    process = os.fork()
    if process == 0:
        _be_child(function, log, limits)
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            code: int | None = os.waitstatus_to_exitcode(status)
            break
        if time.monotonic() - started > limits.seconds:
            code = None
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            break
        time.sleep(_POLL_S)
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    return Ended(code=code, text=text, seconds=time.monotonic() - started)


def _be_child(function: Callable[[], int], log: Path, limits: Limits) -> None:
    code = CRASHED
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        most = pages * resource.getpagesize() + int(limits.memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        code = function()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # neither this process's buffers nor its cleanups are the child's
