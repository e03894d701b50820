"""What `draftcache report` was handed: told by content, never by name, and read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftcache.draft_train.eval_record import read_evaluation
from draftcache.store.common.errors import InputError
from draftcache.store.format.manifest import StoreManifest
from draftcache.store.storage.base import open_storage
from draftcache.tools.reports.page.evaluations import evaluations_beside
from draftcache.tools.reports.page.runs import Run, is_run, read_run

SWEEP = "sweep.json"


@dataclass
class Inputs:
    """What a page is about."""

    runs: list[Run] = field(default_factory=list)
    sweeps: list[Path] = field(default_factory=list)
    evaluations: list[Path] = field(default_factory=list)
    stores: list[str] = field(default_factory=list)


def read_inputs(places: Sequence[str]) -> Inputs:
    """Return what is at each place: a run's directory, a sweep's, a store, or a file of `draftcache eval --output`.

    Evaluations that lie in a run's directory as eval*.json are read too. Raises InputError for anything else.
    """
    found = Inputs()
    planned: list[tuple[Path, str | None, dict[str, Any]]] = []
    for place in places:
        path = Path(place)
        if path.is_file():
            read_evaluation(path)
            found.evaluations.append(path)
        elif (path / SWEEP).is_file():
            found.sweeps.append(path)
            planned += _trials(path)
        elif is_run(path):
            planned.append((path, None, {}))
        elif "://" in place or path.is_dir():
            if not StoreManifest.exists(open_storage(place)):
                raise InputError(_expected(place, "something else"))
            found.stores.append(place)
        else:
            raise InputError(_expected(place, "nothing"))
    names = _short_names([path for path, _, _ in planned])
    for (path, name, axes), short in zip(planned, names, strict=True):
        found.runs.append(read_run(path, name or short, axes))
        found.evaluations += [file for file in evaluations_beside(path) if file not in found.evaluations]
    return found


def _expected(place: str, what: str) -> str:
    return (
        f"{place}: expected a training run, a sweep ({SWEEP}), a store or a file of `draftcache eval --output`, found "
        f"{what}"
    )


def _trials(sweep: Path) -> list[tuple[Path, str | None, dict[str, Any]]]:
    """Return the directory, name and axes of each trial of a sweep; a trial need not have begun."""
    file = sweep / SWEEP
    try:
        trials = json.loads(file.read_text(encoding="utf-8"))["trials"]
        return [(sweep / item["run"], str(item["name"]), dict(item["axes"])) for item in trials]
    except (OSError, ValueError, LookupError, TypeError) as exc:
        raise InputError(
            f"{file}: expected trials, each with name, axes and run, found something else ({exc})"
        ) from exc


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Return the ends of the paths that tell them apart. Raises InputError for a path that is given twice."""
    parts = [path.absolute().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise InputError(f"expected every run once, found {[str(path) for path in paths]}")
    names = []
    for own in parts:
        size = next(
            size for size in range(1, len(own) + 1) if sum(other[-size:] == own[-size:] for other in parts) == 1
        )
        names.append("/".join(own[-size:]))
    return names
