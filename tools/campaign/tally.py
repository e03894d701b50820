"""What a campaign counts, and the faults that it names."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from draftcache.tools.campaign.processes import Ended

FAULTS = ("undetected", "lost", "tracebacks", "wrong codes")
"""Undetected: other content was read, or called whole. Lost: what was committed is gone, or not what an uninterrupted
run makes. Tracebacks: an error without a message of its own. Wrong codes: an exit code that says something else than
what happened, or a command that hangs."""


@dataclass
class Tally:
    """The counts of one kind of attempts."""

    name: str
    attempts: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    said: list[str] = field(default_factory=list)
    """What each fault was."""

    def fault(self, kind: str, what: object) -> None:
        """Count a fault of one of the kinds in FAULTS, and print it."""
        if kind not in FAULTS:
            raise ValueError(kind)
        self.faults[kind] += 1
        self.said.append(f"{self.name}: {kind}: {what}")
        print(f"FAULT {self.said[-1]}", flush=True)

    def judge(self, ended: Ended, codes: tuple[int, ...], what: str = "") -> None:
        """Count a fault unless a process ended with one of these exit codes and without a trace.

        An exit code of 0 that is not among them means that something wrong went unnoticed.
        """
        about = f"{what}: {ended}" if what else str(ended)
        if ended.has_trace:
            self.fault("tracebacks", f"{about}\n{ended.errors[-2000:]}")
        elif ended.code == 0 and 0 not in codes:
            self.fault("undetected", about)
        elif ended.code not in codes:
            self.fault("wrong codes", f"expected one of {codes}: {about}")


def table(tallies: list[Tally]) -> str:
    """Return a Markdown table with a row for each tally and one for the sum."""
    lines = [f"| | attempts | {' | '.join(FAULTS)} |", f"|---|{'---:|' * (1 + len(FAULTS))}"]
    total = Tally("all", sum(tally.attempts for tally in tallies))
    for tally in tallies:
        total.faults.update(tally.faults)
    for tally in [*tallies, total]:
        counts = " | ".join(str(tally.faults[kind]) for kind in FAULTS)
        lines.append(f"| {tally.name} | {tally.attempts:,} | {counts} |")
    return "\n".join(lines)
