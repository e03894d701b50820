"""Rows that cannot be used: why, and where they stand."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from draftcache.store.common.errors import InputError

_FOUND_CHARACTERS = 160


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """Why one row was set aside.

    `line` counts the file's lines, the elements of its JSON array or the rows of its table from 1; 0 stands for the
    file as a whole.
    """

    file: str
    line: int
    reason: str  # a short word by which rejections are counted, such as `malformed-json`
    expected: str
    found: str

    def as_json(self) -> dict[str, Any]:
        """The record of this row in `quarantine.jsonl`."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}: expected {self.expected}; found {self.found}"


class RowRejectedError(InputError):
    """Raised for a row that cannot be used; `at(file, line)` makes the Rejection that is recorded."""

    def __init__(self, reason: str, *, expected: str, found: str) -> None:
        super().__init__(f"{reason}: expected {expected}; found {found}")
        self.reason, self.expected, self.found = reason, expected, found

    def at(self, file: str, line: int) -> Rejection:
        """The rejection of the row in this line of this file."""
        return Rejection(file=file, line=line, reason=self.reason, expected=self.expected, found=self.found)


def clip(value: Any) -> str:
    """`repr(value)`, or the text itself, cut to 160 characters."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits, or nesting that is too deep to show
        text = f"a {type(value).__name__} that can't be shown"
    return text if len(text) <= _FOUND_CHARACTERS else text[:_FOUND_CHARACTERS] + "..."
