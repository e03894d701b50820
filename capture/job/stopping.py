"""Stopping on signals: a preempted job finishes its shard within the grace, or removes what it wrote of it."""

from __future__ import annotations

import math
import signal
from types import FrameType, TracebackType
from typing import Self

from draftcache.store.common.stopping import Stopped, StopRequest


class StopSignals:
    """Turns signals of this process into a StopRequest. Use as a context manager, in the main thread.

    The first `gentle` signal asks for a stop: Stopped is raised at once where no shard was begun, else when the grace
    is over. A second `gentle` signal, or SIGINT, raises it at once, or after the commit that is under way.
    """

    def __init__(self, stop: StopRequest, gentle: signal.Signals = signal.SIGTERM) -> None:
        self._stop = stop
        self._gentle = gentle
        self._previous = {number: signal.getsignal(number) for number in (gentle, signal.SIGINT, signal.SIGALRM)}

    def __enter__(self) -> Self:
        signal.signal(self._gentle, self._ask)
        signal.signal(signal.SIGINT, self._at_once)
        signal.signal(signal.SIGALRM, self._at_once)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._stop.asked:
            self._at_once(number, frame)
            return
        self._stop.ask()
        if not self._stop.in_unit:
            self._raise()
        # Progress is reported once per batch; a timer ends a batch that would outlast the grace.
        signal.setitimer(signal.ITIMER_REAL, max(self._stop.grace_seconds, 1e-3))

    def _at_once(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and not self._stop.asked:
            self._stop.signal_number = signal.SIGINT
        self._stop.ask(0.0)
        if not self._stop.hold_back():
            self._raise()

    def _raise(self) -> None:
        for number in self._previous:  # no further signal may interrupt the cleaning up
            signal.signal(number, signal.SIG_IGN)
        raise Stopped(self._stop.signal_number)


class ParentSignals(StopSignals):
    """Signals of a command whose workers do the job: they only set the StopRequest, and `StopSteps` acts on it."""

    def _raise(self) -> None:
        pass


class StopSteps:
    """The steps by which a command stops its workers: ask, hurry when the grace is over, kill `LEAVING_S` later."""

    LEAVING_S = 15.0
    """Seconds beyond the grace that a worker may take, for a commit under way or for removing an unfinished shard."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop
        self._taken: list[str] = []

    def due(self) -> list[str]:
        """The steps, of "ask", "hurry" and "kill", whose time has come since the last call."""
        left = self._stop.seconds_left() if self._stop.asked else math.inf
        limits = {"ask": math.inf, "hurry": 0.0, "kill": -self.LEAVING_S}
        due = [step for step, limit in limits.items() if left < math.inf and left <= limit and step not in self._taken]
        self._taken += due
        return due
