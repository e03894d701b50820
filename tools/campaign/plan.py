"""The parts of a campaign, one after the other, each over a fresh world."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from draftcache.tools.campaign.inputs import try_all
from draftcache.tools.campaign.kills import kill_again_and_again
from draftcache.tools.campaign.mutations import change_again_and_again, targets
from draftcache.tools.campaign.network import mix_again_and_again
from draftcache.tools.campaign.scenarios import scenarios
from draftcache.tools.campaign.tally import Tally
from draftcache.tools.campaign.world import World


def run_parts(root: Path, counts: Mapping[str, int], only: str | None, random_: random.Random) -> list[Tally]:
    """Run the parts with these numbers of attempts, and return their tallies. `only` names parts or rows."""
    world = World(root / "world")
    tallies = []
    for part, name, count, attempt in _rows(world, root, counts, random_):
        if count == 0 or (only is not None and not any(_is_named(word, part, name) for word in only.split(","))):
            continue
        tallies.append(attempt(count))
        print(f"{name}: {tallies[-1].attempts} attempts, {tallies[-1].faults.total()} faults", flush=True)
    return tallies


def _is_named(word: str, part: str, name: str) -> bool:
    return word in (part, name) or name.startswith(f"{word}:")


def _rows(
    world: World, root: Path, counts: Mapping[str, int], random_: random.Random
) -> list[tuple[str, str, int, Callable[[int], Tally]]]:
    """Return part, name, number of attempts and the attempts of each row."""
    kinds = scenarios(world, root / "scratch")
    each = -(-counts["kills"] // len(kinds))
    kills = [("kills", kind.name, each, partial(kill_again_and_again, kind, root, random_)) for kind in kinds]
    trees = targets(world, root / "scratch")
    each = -(-counts["mutations"] // len(trees))
    mutations = [("mutations", tree.name, each, partial(change_again_and_again, tree, root, random_)) for tree in trees]
    inputs = ("inputs", "wrong inputs", counts["inputs"], partial(try_all, world, root, random_))
    network = ("network", "object store: faults and lies", counts["network"])
    return [*kills, *mutations, inputs, (*network, partial(mix_again_and_again, world, root, random_))]
