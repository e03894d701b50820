"""Times on the lines of a log: where stderr is a file or a pipe, each line begins with the time it was written at.

The command line switches this on for itself and its worker processes. As a library, draftcache never does.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO, cast

_VARIABLE = "DRAFTCACHE_LOG_TIMES"
"""Environment variable that the command sets while it runs, so that its worker processes know of it."""


def now() -> str:
    """Return the time in UTC to the second, as a line begins with it: `2026-11-26T05:29:12Z `."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ ", time.gmtime())


class TimedLines:
    """A text stream that passes on whole lines, each behind the time, and at once: a kill loses no line.

    What is written without a newline is held back, by thread, until the newline comes, so that the lines of several
    threads stay apart. `flush` ends such a line. A line that moves, as progress bars write it with a carriage return,
    is passed on as it was when it ended. All else is the inner stream's.
    """

    def __init__(self, inner: TextIO) -> None:
        self.inner = inner
        self._held: dict[int, str] = {}  # by thread
        self._lock = threading.RLock()  # a handler of a signal may write while its thread does

    def write(self, text: str) -> int:
        """Pass on the lines that this text ends, and hold back what follows the last newline."""
        with self._lock:
            thread = threading.get_ident()
            held = self._held.pop(thread, "")
            if "\r" in held and text[:1] not in ("\r", "\n", ""):  # other text after a line that moves
                self._pass_on([held])
                held = ""
            *lines, rest = (held + text).split("\n")
            if rest:
                self._held[thread] = rest
            self._pass_on(lines)
        return len(text)

    def writelines(self, texts: list[str]) -> None:
        """Write one text after the other."""
        for text in texts:
            self.write(text)

    def flush(self) -> None:
        """Pass on what this thread has written, as a line. A line that moves goes on to be held back."""
        with self._lock:
            held = self._held.get(threading.get_ident(), "")
            if held and "\r" not in held:
                del self._held[threading.get_ident()]
                self._pass_on([held])
        self.inner.flush()

    def finish(self) -> None:
        """Pass on what any thread has written, as lines."""
        with self._lock:
            held = list(self._held.values())
            self._held.clear()
            self._pass_on(held)

    def _pass_on(self, lines: list[str]) -> None:
        """Write these lines. Of one that moved, only its last state is written, and nothing where that is blank."""
        shown = []
        for line in lines:
            last = line.rstrip("\r").rpartition("\r")[2]
            if last.strip() or "\r" not in line:
                shown.append(f"{now()}{last}\n")
        if shown:
            self.inner.write("".join(shown))
            self.inner.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@contextmanager
def times_on_stderr() -> Iterator[None]:
    """Put the time before each line of stderr meanwhile, also in worker processes that call `time_worker_lines`.

    Nothing changes where stderr is a terminal, or where this is on already.
    """
    before = sys.stderr
    if before is None or isinstance(before, TimedLines) or before.isatty():
        yield
        return
    timed = TimedLines(before)
    sys.stderr = cast(TextIO, timed)
    os.environ[_VARIABLE] = "1"
    try:
        yield
    finally:
        os.environ.pop(_VARIABLE, None)
        if cast(Any, sys.stderr) is timed:
            sys.stderr = before
        timed.finish()


def time_worker_lines() -> None:
    """In a worker process, put the time before each line of stderr until it ends, where the command does so."""
    if os.environ.get(_VARIABLE) == "1" and sys.stderr is not None and not isinstance(sys.stderr, TimedLines):
        sys.stderr = cast(TextIO, TimedLines(sys.stderr))
