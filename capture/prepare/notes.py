"""What prepare noticed about rows that it kept: counted by kind, with the first example of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Notes:
    """Counts and first examples by kind, in the order in which the kinds were first seen."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, example: str, count: int = 1) -> None:
        """Count `kind`, and keep `example` if it is the first of its kind."""
        self.counts[kind] = self.counts.get(kind, 0) + count
        self.examples.setdefault(kind, example)

    def merge(self, others: Notes, where: str = "") -> None:
        """Add all of `others`, whose examples get the prefix `where`."""
        for kind, count in others.counts.items():
            self.add(kind, where + others.examples[kind], count)

    def as_json(self) -> list[dict[str, Any]]:
        """The records `kind`, `count` and `example` for a manifest."""
        return [{"kind": kind, "count": self.counts[kind], "example": self.examples[kind]} for kind in self]

    @classmethod
    def from_json(cls, records: list[dict[str, Any]]) -> Notes:
        """The notes of `as_json`."""
        notes = cls()
        for record in records:
            notes.add(record["kind"], record["example"], record["count"])
        return notes

    def __iter__(self) -> Iterator[str]:
        return iter(self.counts)
