"""How far a sweep is, read from its trials' logs, wherever the workers run."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from draftcache.store.common.progress import progress_bar
from draftcache.tools.sweep.plan import RUNS, Sweep

_TAIL_BYTES = 16_384
"""More than the last record of a log takes."""


def last_record(run: Path) -> dict[str, Any] | None:
    """Return the newest whole record of a run's metrics.jsonl, or None where there is none yet."""
    path = run / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return None
    for line in reversed(lines):
        if line.endswith(b"\n"):
            try:
                found: dict[str, Any] = json.loads(line)
            except ValueError:
                continue
            return found
    return None


class SweepProgress:
    """A bar over the optimizer steps of all trials. It is a context manager."""

    def __init__(self, sweep: Sweep, output: Path) -> None:
        self._runs = [output / RUNS / trial.name for trial in sweep.trials]
        self._bar = progress_bar(unit="step", desc="sweep")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refresh()
        self._bar.close()

    def refresh(self) -> None:
        """Show how far the trials are."""
        records = [record for run in self._runs if (record := last_record(run)) is not None]
        steps = sum(int(record["step"]) for record in records)
        lengths = [record["eval_acceptance_length"] for record in records if "eval_acceptance_length" in record]
        text = f"{len(records)} of {len(self._runs)} trials begun"
        if lengths:
            text += f", best acceptance length {max(lengths):.3f}"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(steps - self._bar.n)
