"""Which trials end early: successive halving over files, so that workers on any number of machines share its state.

`rungs/STEP/TRIAL.json` holds a trial's acceptance length at a rung, and whether the trial went on from there.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from draftcache.store.common.files import read_json, write_json
from draftcache.tools.sweep.plan import Asha

FOLDER = "rungs"


class Rungs:
    """The rungs of a sweep in its directory."""

    def __init__(self, output: Path, asha: Asha) -> None:
        self._folder = output / FOLDER
        self._asha = asha

    def decide(self, step: int, lengths: Mapping[str, float]) -> dict[str, bool]:
        """Record the acceptance lengths of trials at a rung, and return which of the trials go on.

        What was decided before stays decided, so that a sweep that was killed goes on as it was.
        """
        folder = self._folder / f"{step:08d}"
        known = {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}
        values = {name: record["acceptance"] for name, record in known.items()} | dict(lengths)
        found = {}
        for name, length in lengths.items():
            if name in known:
                found[name] = bool(known[name]["goes_on"])
                continue
            # At least one trial goes on from every rung, and of equal ones all do.
            better = sum(value > length for value in values.values())
            found[name] = better < max(1, len(values) // self._asha.reduction)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / f"{name}.json", {"acceptance": length, "goes_on": found[name]})
        return found

    def ended(self) -> dict[str, int]:
        """Return the trials that ended early, with the steps that each has made."""
        return {
            path.stem: int(path.parent.name)
            for path in sorted(self._folder.glob("*/*.json"))
            if not read_json(path)["goes_on"]
        }
