"""The drafts that `draftcache.tools.bench.drafts` compares, and how each is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from draftcache.store.common.errors import InputError
from draftcache.tools.bench.parts.ablation_bench import DEFAULTS, Bench

BLOCK_SIZE = 8
LAYERS = (1, 3, 5)
REFERENCE = "eagle3-1"
"""The case that the others are compared with in pairs."""
SHARED = {name: value for name, value in DEFAULTS.items() if name != "ttt_steps"}
"""Settings of every draft. Losses, decays and other settings are those that each architecture is published with."""


@dataclass(frozen=True)
class DraftCase:
    """A draft of one architecture and depth."""

    draft: str
    layers: int

    @property
    def name(self) -> str:
        """The name of its rows."""
        return f"{self.draft}-{self.layers}"

    def settings(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return its settings of `draftcache train`. Keys `DRAFT.KEY` of `given` are settings of that architecture."""
        if self.draft == "eagle3":
            own: dict[str, Any] = {"draft": self.draft, "ttt_steps": DEFAULTS["ttt_steps"]}
        else:
            own = {"draft": self.draft, "block_size": BLOCK_SIZE, "num_hidden_layers": self.layers}
        return own | {
            name.partition(".")[2]: value for name, value in given.items() if name.startswith(self.draft + ".")
        }


_ALL = [DraftCase("eagle3", 1), *(DraftCase(draft, layers) for draft in ("dflash", "dspark") for layers in LAYERS)]
CASES = {case.name: case for case in _ALL}
DRAFTS = tuple(dict.fromkeys(case.draft for case in CASES.values()))


def split_settings(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of every draft and those of one architecture, which are named DRAFT.KEY.

    Raises InputError for an architecture that is not compared.
    """
    own = {name: value for name, value in given.items() if "." in name}
    if wrong := [name for name in own if name.partition(".")[0] not in DRAFTS]:
        raise InputError(f"--train: expected KEY=VALUE or DRAFT.KEY=VALUE with a draft of {DRAFTS}, found {wrong}")
    return {name: value for name, value in given.items() if name not in own}, own


def trained(bench: Bench, case: DraftCase, rates: Sequence[float], given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Train a case with every seed, and return its trials in the order of seeds, with their `learning_rate`.

    Seed 0 is trained with each rate. The other seeds have the one whose acceptance on the held-out split was best.
    """
    settings, store = case.settings(given), bench.store()
    tried = bench.swept(case.name, 0, store, {"learning_rate": list(rates)}, **settings)
    best = max(tried, key=lambda trial: float(trial["acceptance_length"]))
    rate = best["axes"]["learning_rate"]

    def other(seed: int) -> dict[str, Any]:
        (trial,) = bench.swept(case.name, seed, store, **settings | {"learning_rate": rate})
        return trial

    calls = [lambda seed=seed: other(seed) for seed in range(1, bench.setup.seeds)]
    return [trial | {"learning_rate": rate} for trial in [best, *bench.together(calls)]]
