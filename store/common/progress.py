"""How far long work has come: one moving line on a terminal, a line now and then where stderr is a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

LOG_SECONDS = 30.0
"""Between two lines of a log. What moves ten times a second would add 100 MB to it in a day, all on one line."""


def progress_bar(**settings: Any) -> Any:
    """A tqdm with these settings, on stderr."""
    if sys.stderr.isatty():
        return tqdm(**settings)
    return _LogLines(**settings, mininterval=LOG_SECONDS, miniters=1, leave=False)


class _LogLines(tqdm):  # type: ignore[misc]  # which has no types
    """Writes whole lines, the last one when the work ends."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """An empty `msg` would clear a line."""
        if msg == "":
            return False
        print(str(self) if msg is None else msg, file=self.fp, flush=True)
        return True

    @classmethod
    @contextmanager
    def external_write_mode(cls, file: Any = None, nolock: bool = False) -> Iterator[None]:
        """Nothing has to make way for what else is written."""
        yield

    def close(self) -> None:
        self.refresh()
        super().close()
