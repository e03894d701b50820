"""Lines of logs, each of which begins with the time."""

from __future__ import annotations

import re

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ")


def without_times(text: str) -> str:
    """Take the time off each line, and fail where a line has none."""
    lines = text.splitlines(keepends=True)
    assert all(TIME.match(line) for line in lines), lines
    return "".join(TIME.sub("", line, count=1) for line in lines)
