"""The trials of a sweep: every combination of the values on its axes, over settings that all trials share.

A sweep is a TOML file. [train] holds flags of `draftcache train`, [train.NAME] flags of the trials with `draft = NAME`
alone, [axes] lists of values for some of those flags, and [asha], which may be left out, says when trials that do worse
than others end early.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.drafts.registry import DEFAULT, architecture_names
from draftcache.draft_train.run_checks import require_trainable
from draftcache.store.common.errors import InputError
from draftcache.store.common.files import canonical_json
from draftcache.store.reader import StoreReader
from draftcache.tools.arguments import add_settings, read_settings
from draftcache.tools.config_file import actions_of, command_parser, name_of, nearest, place_in, read_toml, words_of

PLAN_NAME = "sweep.json"
RUNS = "runs"
SEED = "seed"
"""The axis over which results are averaged."""
_SECTIONS = ("train", "axes", "asha")
_OWN = ("output", "device", "track_group", "debug")
"""Flags that a sweep sets itself, or that say nothing of a trial."""


@dataclass(frozen=True, kw_only=True)
class Asha:
    """Asynchronous successive halving (Li et al. 2018, arXiv 1810.05934), in the form that stops trials.

    At `first` optimizer steps, and at `reduction` times as many from rung to rung, a trial goes on if its acceptance
    length is among the best 1/`reduction` of all trials that have come to that rung so far.
    """

    first: int
    """Optimizer steps of the first rung; a multiple of --eval-every."""
    reduction: int = 3

    def __post_init__(self) -> None:
        for name, least in (("first", 1), ("reduction", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"[asha] {name}: expected a whole number of at least {least}, found {value!r}")

    def rungs(self, total_steps: int) -> list[int]:
        """Return the steps of all rungs below `total_steps`."""
        rungs = itertools.takewhile(lambda step: step < total_steps, self._all())
        return list(rungs)

    def _all(self) -> Any:
        return (self.first * self.reduction**number for number in itertools.count())


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training run of a sweep."""

    name: str
    axes: dict[str, Any]
    """Its value on each axis, as the file has it."""
    config: TrainConfig

    def to_json(self) -> dict[str, Any]:
        """Return the trial as JSON values; `run` is relative to the sweep's directory."""
        run = f"{RUNS}/{self.name}"
        return {"name": self.name, "axes": self.axes, "run": run, "settings": self.config.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Trial:
        """Return the trial of `to_json`."""
        config = TrainConfig.from_json(values["settings"])
        return cls(name=values["name"], axes=dict(values["axes"]), config=config)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All trials of a sweep."""

    axes: dict[str, list[Any]]
    trials: list[Trial]
    asha: Asha | None = None
    groups: list[list[int]] = field(default_factory=list)
    """Positions of trials that read the same data in the same order."""

    def to_json(self) -> dict[str, Any]:
        """Return the content of sweep.json."""
        return {
            "axes": self.axes,
            "asha": None if self.asha is None else asdict(self.asha),
            "groups": self.groups,
            "trials": [trial.to_json() for trial in self.trials],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Sweep:
        """Return the sweep of `to_json`."""
        return cls(
            axes=values["axes"],
            trials=[Trial.from_json(item) for item in values["trials"]],
            asha=None if values["asha"] is None else Asha(**values["asha"]),
            groups=values["groups"],
        )


def read_sweep(path: Path, output: Path) -> Sweep:
    """Read a sweep's file, and check every trial's settings against its store.

    Raises InputError, which names file, section, line and flag, for sections, flags or values that are none, and what
    `require_trainable` raises for what a store can't serve.
    """
    body = read_toml(path)
    for name in body:
        if name not in _SECTIONS:
            raise InputError(
                f"{place_in(path)(name)}: expected the sections {list(_SECTIONS)}, found {name!r}: "
                f"{nearest(name, _SECTIONS)}"
            )
    for name in ("train", "axes"):
        if not isinstance(body.get(name), dict) or not body[name]:
            raise InputError(f"{path}: expected a section [{name}] with flags of `draftcache train`, found none")
    axes = _axes(path, body["axes"])
    asha = _asha(path, body.get("asha"))
    shared = {name_of(key): value for key, value in body["train"].items() if not isinstance(value, dict)}
    of_draft = _of_draft(path, body["train"])
    for key in (*shared, *axes, *(key for own in of_draft.values() for key in own)):
        if key in _OWN:
            raise InputError(f"{path}: expected no {key}, which the sweep decides itself; leave it out")
    shared.setdefault("track_group", output.name)
    trials = []
    for number, values in enumerate(itertools.product(*axes.values())):
        chosen = dict(zip(axes, values, strict=True))
        name = f"trial_{number:04d}"
        own = of_draft.get((shared | chosen).get("draft", DEFAULT), {})
        config = _config(path, shared | own, chosen, output / RUNS / name)
        trials.append(Trial(name=name, axes=chosen, config=config))
    _check(path, trials, asha)
    return Sweep(axes=axes, trials=trials, asha=asha, groups=_groups(trials))


def _of_draft(path: Path, section: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the flags of the sections [train.NAME] by the architecture that they are for."""
    known = architecture_names()
    found = {key: value for key, value in section.items() if isinstance(value, dict)}
    for key in found:
        if key not in known:
            raise InputError(
                f"{path}: [train.{key}]: expected the name of an architecture, one of {known}: {nearest(key, known)}"
            )
    return {key: {name_of(name): value for name, value in own.items()} for key, own in found.items()}


def _axes(path: Path, section: Mapping[str, Any]) -> dict[str, list[Any]]:
    place = place_in(path, "axes")
    for key, values in section.items():
        if not isinstance(values, list) or not values:
            raise InputError(f"{place(key)}: expected a list of values for {key}, found {values!r}")
        texts = [canonical_json(value) for value in values]
        if len(set(texts)) < len(texts):
            raise InputError(f"{place(key)}: expected every value of {key} once, found {values!r}")
    return {name_of(key): list(values) for key, values in section.items()}


def _asha(path: Path, section: Any) -> Asha | None:
    if section is None:
        return None
    known = tuple(Asha.__dataclass_fields__)
    for key in section:
        if key not in known:
            raise InputError(
                f"{place_in(path, 'asha')(key)}: expected one of {list(known)}, found {key!r}: {nearest(key, known)}"
            )
    if "first" not in section:
        raise InputError(f"{path}: [asha]: expected first, the optimizer steps of the first rung, found none")
    return Asha(**section)


def _config(path: Path, shared: Mapping[str, Any], chosen: Mapping[str, Any], output: Path) -> TrainConfig:
    """Return the settings of one trial; values of an axis take the place of shared ones."""
    parser = command_parser(lambda parser: add_settings(parser, TrainConfig), "train")
    actions = actions_of(parser)
    rest = {key: value for key, value in shared.items() if key not in chosen}
    words = words_of(actions, chosen, place_in(path, "axes"), "draftcache train")
    words += words_of(actions, rest, place_in(path, "train"), "draftcache train")
    try:
        config = read_settings(TrainConfig, parser.parse_args([*words, "--output", str(output.absolute())]))
    except InputError as exc:
        raise InputError(f"{path}: with {dict(chosen)}: {exc}") from exc
    if config.eval_split is None:
        raise InputError(f"{path}: [train]: expected eval_split, the split that trials are compared on, found none")
    if "://" in str(config.store):
        return config
    return replace(config, store=Path(config.store).absolute())  # workers of a cluster have other working directories


def _check(path: Path, trials: Sequence[Trial], asha: Asha | None) -> None:
    stores: dict[str, StoreReader] = {}
    for trial in trials:
        location = str(trial.config.store)
        if location not in stores:
            stores[location] = StoreReader(trial.config.store)
        try:
            require_trainable(trial.config, stores[location])
        except InputError as exc:
            raise InputError(f"{path}: with {trial.axes}: {exc}") from exc
        every = trial.config.eval_every
        if asha is not None and (not every or asha.first % every):
            raise InputError(
                f"{path}: [asha] first: expected a multiple of eval_every, at which trials are measured, found "
                f"{asha.first} with eval_every {every}"
            )


def _groups(trials: Sequence[Trial]) -> list[list[int]]:
    found: dict[str, list[int]] = {}
    for number, trial in enumerate(trials):
        key = canonical_json({**trial.config.reading(), "store": str(trial.config.store)})
        found.setdefault(key, []).append(number)
    return list(found.values())
