"""Verdicts of the checks, as a table for people and as result rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from draftcache.tools.result_rows import result_row

_WORDS = {True: "ok", False: "FAILED", None: "not checked"}


@dataclass(frozen=True)
class Verdict:
    """What one check found of one case."""

    case: str
    check: str
    passed: bool | None
    """None where it could not be checked."""
    found: str
    """In words, with the bound."""
    metrics: tuple[tuple[str, float, str], ...] = field(default=())
    """(metric, value, unit)."""

    def line(self) -> str:
        """Return it as a line of text."""
        return f"{self.case}: {self.check}: {_WORDS[self.passed]}: {self.found}"


def table(verdicts: Sequence[Verdict]) -> str:
    """Return the verdicts, one per line."""
    heads = ("case", "check", "verdict", "found")
    lines = [heads, *((item.case, item.check, _WORDS[item.passed], item.found) for item in verdicts)]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(
        "  ".join([*(word.ljust(width) for word, width in zip(line, widths, strict=False)), line[3]]) for line in lines
    )


def rows(verdicts: Sequence[Verdict], versions: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """Return a row for every metric, and one for each verdict: 1 where it passed, 0 where it failed.

    A check that could not be made has no row. Each row also has the `versions` of the engine and its libraries.
    """
    found = []
    for item in verdicts:
        verdict = [] if item.passed is None else [(f"{item.check}_passed", float(item.passed), "1 = yes")]
        for metric, value, unit in [*verdict, *item.metrics]:
            found.append(result_row(item.case, metric, value, unit, device) | {"versions": versions})
    return found


def failed(verdicts: Sequence[Verdict]) -> bool:
    """Return whether a check failed."""
    return any(item.passed is False for item in verdicts)
