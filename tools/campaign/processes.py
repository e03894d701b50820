"""Commands as processes of their own, forked from one that has imported everything, so that a thousand take minutes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

_LATE_IMPORTS = (
    "transformers.models.nemotron_h.modeling_nemotron_h", "draftcache.capture.job.launch",
    "draftcache.capture.prepare.job", "draftcache.draft_train.trainer", "draftcache.draft_train.evaluate",
    "draftcache.draft_train.export", "draftcache.store.convert", "draftcache.tools.probe.dump",
)  # fmt: skip
"""What commands import only once they run."""
PATIENCE_S = 120.0
"""Seconds after which a command counts as hanging. Every command of the campaign takes a few."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a process ended."""

    words: str
    """What it ran."""
    code: int | None
    """Exit code; the negative number of the signal that killed it; None where it hung."""
    output: str
    errors: str
    seconds: float

    @property
    def has_trace(self) -> bool:
        """Whether it ended by an error that draftcache has no message for."""
        return "Traceback" in self.errors or "internal error" in self.errors

    def __str__(self) -> str:
        last = self.errors.strip().splitlines()[-1:] or [""]
        return f"{self.words}: exit code {self.code}: {last[0][:300]}"


def import_everything() -> None:
    """Import what commands import as they run, which would take each forked process seconds."""
    for name in _LATE_IMPORTS:
        import_module(name)


class Process:
    """A forked process that runs `call` and ends with the exit code that it returns.

    Without `locks`, flock does nothing in it, as on filesystems whose locks don't lock.
    """

    def __init__(self, call: Callable[[], int], *, words: str = "", locks: bool = True) -> None:
        self.words = words
        self._output, self._errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (closed by wait)
        self._started = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(call, locks)

    def _run(self, call: Callable[[], int], locks: bool) -> None:
        code = 3
        try:
            os.setsid()
            for number, file in ((1, self._output), (2, self._errors)):
                os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
            if not locks:
                fcntl.flock = lambda *_: None
            code = call()
        except SystemExit as exc:
            code = exc.code if isinstance(exc.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def kill_after(self, seconds: float) -> bool:
        """Kill the process and its children after this time. Returns whether it was still alive then."""
        alive = not self._ends_within(max(0.0, self._started + seconds - time.monotonic()))
        self._kill()
        return alive

    def wait(self) -> Ended:
        """Wait for the end, however it comes. A process that hangs is killed."""
        hangs = not self._ends_within(PATIENCE_S)
        if hangs:
            self._kill()
        _, status = os.waitpid(self.pid, 0)
        seconds = time.monotonic() - self._started
        texts = []
        for file in (self._output, self._errors):
            with file:
                file.seek(0)
                texts.append(file.read().decode(errors="replace"))
        code = None if hangs else os.waitstatus_to_exitcode(status)
        return Ended(words=self.words, code=code, output=texts[0], errors=texts[1], seconds=seconds)

    def _ends_within(self, seconds: float) -> bool:
        descriptor = os.pidfd_open(self.pid)
        try:
            return bool(select.select([descriptor], [], [], seconds)[0])
        finally:
            os.close(descriptor)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)  # it may not have become a group of its own yet
            os.killpg(self.pid, signal.SIGKILL)


def start(words: Sequence[object], *, locks: bool = True) -> Process:
    """Start a `draftcache` command."""
    from draftcache.tools.cli import main

    texts = [str(word) for word in words]
    return Process(lambda: main(texts), words=f"draftcache {' '.join(texts)}", locks=locks)


def run(words: Sequence[object]) -> Ended:
    """Run a `draftcache` command to its end."""
    return start(words).wait()


def begin(function: Callable[[], Any]) -> Process:
    """Start a function in a process of its own, which prints what it returns. An error ends it as it ends a command."""
    from draftcache.store.common.failures import describe_failure, exit_code_of

    def guarded() -> int:
        try:
            print(function())
        except Exception as exc:
            print(describe_failure(exc), file=sys.stderr)
            return exit_code_of(exc)
        return 0

    return Process(guarded, words=getattr(function, "__name__", "a function"))


def call(function: Callable[[], Any]) -> Ended:
    """Run a function to its end as `begin` does."""
    return begin(function).wait()
