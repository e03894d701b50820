"""Being told to stop: a preempted run finishes its step, saves, and says where it is."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Self


class TrainingStopped(KeyboardInterrupt):
    """The run was told to stop, and has saved a checkpoint."""

    def __init__(self, step: int, signal_number: int = signal.SIGTERM) -> None:
        super().__init__(step)
        self.step = step
        """Optimizer steps done."""
        self.exit_code = 128 + signal_number
        """143 for SIGTERM: what schedulers expect."""


class StopRequest:
    """Whether to go on after this step. As a context manager in the main thread, SIGTERM asks to stop.

    A second SIGTERM ends the process at once, as if there were no handler.
    """

    def __init__(self) -> None:
        self.asked = False
        self._previous = signal.getsignal(signal.SIGTERM)

    def __enter__(self) -> Self:
        signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._previous)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
