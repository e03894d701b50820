"""How long-running work is told to stop: a request is noted when it comes and checked where it can be honoured.

A request may come by a signal, from another process or from another thread. `StopRequest` knows whether it has come,
how much time is left, and whether a unit of work is under way that should be finished first.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from draftcache.store.common.log_times import TimedLines, now


class Stopped(KeyboardInterrupt):
    """The work was told to stop, and has stopped. A signal's handler may raise this error at any instant."""

    def __init__(self, signal_number: int = signal.SIGTERM) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number
        """Exit status of the process: 143 for SIGTERM, 130 for SIGINT, as shells and schedulers expect."""


class StopRequest:
    """Whether, and until when, work may go on. It is safe to use from several threads."""

    def __init__(self, grace_seconds: float = 0.0) -> None:
        """`grace_seconds` is how long a unit of work that is under way may still take once a stop is asked for."""
        self.grace_seconds = grace_seconds
        self.signal_number: int = signal.SIGTERM
        self.in_unit = False
        """Whether a unit of work is under way. Only then is there anything to finish."""
        self._asked = threading.Event()
        self._deadline = 0.0
        self._undivided = False
        self._held_back = False

    @property
    def asked(self) -> bool:
        """Whether a stop was asked for."""
        return self._asked.is_set()

    def ask(self, grace_seconds: float | None = None) -> None:
        """Ask for a stop: no other unit begins, and the current one may take `grace_seconds` more.

        The default is the constructor's `grace_seconds`.
        """
        seconds = self.grace_seconds if grace_seconds is None else grace_seconds
        self._deadline = time.monotonic() + seconds
        self._asked.set()

    def seconds_left(self) -> float:
        """Return the seconds until the grace is over, once a stop was asked for."""
        return self._deadline - time.monotonic()

    def check(self) -> None:
        """Raise Stopped where a stop was asked for and there is no unit to finish, or no time left to finish it."""
        if self.asked and (not self.in_unit or self.seconds_left() <= 0):
            raise Stopped(self.signal_number)

    def wait(self, seconds: float) -> None:
        """Sleep for `seconds`, or until a stop is asked for, and then `check`."""
        self._asked.wait(seconds)
        self.check()

    @contextmanager
    def unit(self) -> Iterator[None]:
        """Surround one unit of work, its commit included. Raises Stopped where a stop was asked for before."""
        self.check()
        self.in_unit = True
        try:
            yield
        finally:
            self.in_unit = False

    @contextmanager
    def undivided(self) -> Iterator[None]:
        """Surround what takes seconds and must not be broken off, such as a commit.

        Raises Stopped after it where `hold_back` was called during it.
        """
        self._undivided = True
        try:
            yield
        finally:
            self._undivided = False
        if self._held_back:
            raise Stopped(self.signal_number)

    def hold_back(self) -> bool:
        """Return whether to stop after what `undivided` surrounds rather than now.

        The result is True once only, as a commit may hang.
        """
        first = self._undivided and not self._held_back
        self._held_back = self._held_back or first
        return first


@contextmanager
def asked_by_signals(stop: StopRequest) -> Iterator[StopRequest]:
    """Have SIGTERM and SIGINT (Ctrl-C) ask `stop`, in the main thread.

    After the first of them, another SIGTERM ends the process at once, as without a handler, another SIGINT raises
    KeyboardInterrupt at once, and a third signal ends the process even where it does not come to run Python code. A
    SIGINT that is ignored, as a shell has it in jobs in the background, stays ignored.
    """
    previous = {signal.SIGTERM: signal.getsignal(signal.SIGTERM)}
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        previous[signal.SIGINT] = signal.getsignal(signal.SIGINT)

    def ask(number: int, _frame: FrameType | None) -> None:
        stop.signal_number = number
        stop.ask()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if signal.SIGINT in previous:
            signal.signal(signal.SIGINT, interrupt)
        if number == signal.SIGINT:  # not print, which must not be entered twice
            begin = now() if isinstance(sys.stderr, TimedLines) else "\n"
            line = f"{begin}stopping after the step that is running; press Ctrl-C again to stop at once\n"
            os.write(2, line.encode())

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt

    for number in previous:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def sigterm_stops() -> Iterator[None]:
    """Have SIGTERM raise Stopped in the main thread, as Ctrl-C raises KeyboardInterrupt. A second one ends the process
    at once, as without a handler.
    """

    def stop(number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Stopped(number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back while worker processes are started, which have both blocked from then on.

    Ctrl-C reaches the workers too, and SIGTERM may: they leave both to this process, so that no worker prints a trace.
    A worker that this process has begun to start is started whole. What came meanwhile is handled at the end.
    """
    held = (signal.SIGINT, signal.SIGTERM)
    came: list[int] = []
    previous: dict[signal.Signals, signal._HANDLER] = {}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        # Blocking is not enough: another thread receives the signal then, and Python handles it in the main thread.
        if threading.current_thread() is threading.main_thread():
            for number in held:
                handler = signal.getsignal(number)
                if handler not in (None, signal.SIG_IGN):
                    previous[number] = handler
                    signal.signal(number, lambda late, _frame: came.append(late))
        signal.pthread_sigmask(signal.SIG_BLOCK, held)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        for number, handler in previous.items():
            signal.signal(number, handler)
        for late in dict.fromkeys(came):
            signal.raise_signal(late)
