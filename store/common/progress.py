"""Progress of long work: one moving line on a terminal, and a line now and then where stderr is a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 30.0
"""Seconds between two lines of a log. A bar that moves ten times a second would add 100 MB a day, all on one line."""


def progress_bar(**settings: Any) -> Any:
    """Return a tqdm with these settings, which writes to stderr."""
    if sys.stderr.isatty():
        return _Bar(**settings)
    return _LogLines(**settings, mininterval=LOG_SECONDS, miniters=1, leave=False)


def set_total(bar: Any, total: int, done: int = 0) -> None:
    """Tell a bar how much work there is, once that is known, and how much of it was done before: from here on it shows
    a percentage and the time that is left.
    """
    if not bar.disable:
        bar.total = total
        bar.initial = bar.n = bar.last_print_n = done
        bar.start_t = bar.last_print_t = bar._time()
        bar.refresh()


class _Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
    """A tqdm that Ctrl-C may interrupt while it is made."""

    def __del__(self) -> None:
        """Close a bar that was dropped open. One that is half made has nothing that could be closed."""
        if hasattr(self, "start_t"):  # what tqdm's constructor sets last
            super().__del__()


class _LogLines(_Bar):
    """A tqdm that writes whole lines, the last one when the work ends."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Print a line. Nothing is printed for an empty `msg`, with which tqdm clears a line."""
        if msg == "":
            return False
        print(str(self) if msg is None else msg, file=self.fp, flush=True)
        return True

    @classmethod
    @contextmanager
    def external_write_mode(cls, file: Any = None, nolock: bool = False) -> Iterator[None]:
        """Do nothing: no moving line has to be cleared before other text is written."""
        yield

    def close(self) -> None:
        self.refresh()
        super().close()
