"""SIGKILL at any instant: what was committed stays, and the same command makes what an uninterrupted one makes."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftcache.store.common.errors import DraftcacheError
from draftcache.tools.campaign.processes import Ended, call, run, start
from draftcache.tools.campaign.tally import Tally
from draftcache.tools.campaign.world import World, committed, run_content, store_content, tree_content

REFUSED = 2


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A command, what it writes, and what must hold of that."""

    name: str
    words: Callable[[Path], list[object]]
    """The command that writes to a path."""
    content: Callable[[Path], Any]
    """What the path holds in the end. It equals that of `reference`."""
    reference: Path
    whole: Callable[[Path], Ended | None] = lambda path: None
    """Run after every kill where the path exists: a command that has to succeed, and None where there is nothing to
    check."""
    kept: Callable[[Path], dict[str, Any]] = lambda path: {}
    """What is committed at the path, which no later kill may take away or change."""
    start_from: Callable[[Path], None] = lambda path: None
    """Makes the path before the first run."""
    writers: int = 1
    locks: bool = True
    loser: tuple[int, ...] = (0,)
    """Exit codes of all writers but one, where several are at work."""
    again: tuple[int, ...] = (0,)
    """Exit codes of the command where it has ended already."""


def kill_again_and_again(scenario: Scenario, root: Path, random_: random.Random, kills: int) -> Tally:
    """Kill the scenario's command this many times, at random instants; count what goes wrong."""
    tally = Tally(scenario.name)
    expected = scenario.content(scenario.reference)
    duration = _measure(scenario, root)
    place, made = root / "place" / "output", False
    while tally.attempts < kills:
        if not made:
            shutil.rmtree(place.parent, ignore_errors=True)
            place.parent.mkdir(parents=True)
            scenario.start_from(place)
            kept: dict[str, Any] = {}
            rounds, made = random_.randint(1, 8), True
        processes = [start(scenario.words(place), locks=scenario.locks) for _ in range(scenario.writers)]
        alive = [process.kill_after(random_.uniform(0, 1.05 * duration)) for process in processes]
        for process, killed in zip(processes, alive, strict=True):
            ended = process.wait()
            if not killed:
                tally.judge(ended, (0, *scenario.loser, *scenario.again))
        tally.attempts += sum(alive)
        kept = _check_kept(tally, scenario, place, kept)
        rounds -= 1
        if rounds == 0 or tally.attempts >= kills:
            _finish(tally, scenario, place, expected)
            made = False
    shutil.rmtree(place.parent, ignore_errors=True)
    return tally


def _measure(scenario: Scenario, root: Path) -> float:
    place = root / "measured" / "output"
    place.parent.mkdir(parents=True)
    scenario.start_from(place)
    ended = run(scenario.words(place))
    shutil.rmtree(place.parent)
    return ended.seconds


def _check_kept(tally: Tally, scenario: Scenario, place: Path, kept: dict[str, Any]) -> dict[str, Any]:
    if not place.exists():
        if kept:
            tally.fault("lost", f"{place} is gone")
        return kept
    ended = scenario.whole(place)
    if ended is not None:
        if ended.has_trace:
            tally.fault("tracebacks", ended)
        elif ended.code != 0:
            tally.fault("lost", f"after a kill: {ended} {ended.output[-500:]}")
    try:
        now = scenario.kept(place)
    except DraftcacheError as exc:
        tally.fault("lost", exc)
        return kept
    for name, value in kept.items():
        if now.get(name) != value:
            tally.fault("lost", f"{place}: {name} was committed, and is now {'gone' if name not in now else 'another'}")
    return now


def _finish(tally: Tally, scenario: Scenario, place: Path, expected: Any) -> None:
    """Run the command to its end, by all writers at once, and compare what it made."""
    processes = [start(scenario.words(place), locks=scenario.locks) for _ in range(scenario.writers)]
    ends = [process.wait() for process in processes]
    for ended in ends:
        tally.judge(ended, (0, *scenario.loser, *scenario.again))
    if not any(ended.code in (0, *scenario.again) for ended in ends):
        tally.fault("wrong codes", f"of several writers none succeeded: {', '.join(map(str, ends))}")
        return
    ended = run(scenario.words(place))  # one more: what is finished stays as it is
    tally.judge(ended, (0, *scenario.again))
    try:
        found = scenario.content(place)
    except (DraftcacheError, OSError, LookupError) as exc:
        tally.fault("lost", f"{scenario.name}: {exc!r}")
        return
    if found != expected:
        tally.fault(
            "lost", f"{scenario.name}: made something else than an uninterrupted run: {_difference(found, expected)}"
        )


def _difference(found: Any, expected: Any) -> str:
    if isinstance(found, dict) and isinstance(expected, dict):
        names = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
        return ", ".join(
            f"{name}: {str(found.get(name))[:200]} != {str(expected.get(name))[:200]}" for name in names[:3]
        )
    return f"{found} != {expected}"


def scenarios(world: World, scratch: Path) -> list[Scenario]:
    """Return every command that writes, and those that only read, alone and two at a time."""

    def verified(path: Path) -> Ended | None:
        return run(["verify", path, "--allow-partial"]) if (path / "manifest.json").exists() else None

    def dataset(path: Path) -> Ended:
        return run(["verify", path])

    def exportable(path: Path) -> Ended | None:
        if not any((path / "checkpoints").glob("step_*")):
            return None
        shutil.rmtree(scratch, ignore_errors=True)
        return run(world.export(scratch, path))

    def same_as(reference: Path) -> Callable[[Path], Ended | None]:
        def compare(path: Path) -> Ended | None:
            def unchanged() -> str:
                if tree_content(path) != tree_content(reference):
                    raise DraftcacheError(f"{path}: half of a result")
                return "equal"

            return call(unchanged)

        return compare

    def damaged(path: Path) -> None:
        shutil.copytree(world.root / "zarr", path)
        victim = next(iter(sorted((path / "shards").glob("*1/tap_2_lo/c.*"))), None)
        victim = victim or min((path / "shards" / "00001").glob("tap_2_lo/**/c*"))
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)

    def undamaged(path: Path) -> Any:
        run(world.capture(path))
        return store_content(path)

    def store_scenario(layout: str, **more: Any) -> Scenario:
        return Scenario(
            words=lambda path: world.capture(path, layout=layout),
            content=store_content, reference=world.root / layout, whole=verified, kept=committed, **more,
        )  # fmt: skip

    def training(**more: Any) -> Scenario:
        return Scenario(words=world.train, content=run_content, reference=world.root / "run", whole=exportable, **more)

    def conversion(**more: Any) -> Scenario:
        return Scenario(
            words=lambda path: world.convert(path, "webdataset"), content=store_content, whole=verified, kept=committed,
            reference=world.root / "converted-webdataset", **more,
        )  # fmt: skip

    def preparing(**more: Any) -> Scenario:
        return Scenario(
            words=world.prepare, content=tree_content, reference=world.root / "prepared", whole=dataset, **more
        )

    def copied(name: str) -> Callable[[Path], None]:
        def copy(path: Path) -> None:
            shutil.copytree(world.root / name, path)

        return copy

    def reading(name: str) -> Scenario:
        return Scenario(
            name=name, words=lambda path: [name, path], content=tree_content, start_from=copied("zarr"),
            reference=world.root / "zarr", whole=same_as(world.root / "zarr"),
        )  # fmt: skip

    return [
        store_scenario("zarr", name="capture: zarr"),
        store_scenario("webdataset", name="capture: webdataset"),
        store_scenario("zarr", name="capture: two at a time", writers=2),
        store_scenario("zarr", name="capture: two without locks", writers=2, locks=False),
        training(name="train"),
        training(name="train: two at a time", writers=2, loser=(0, REFUSED)),
        training(name="train: two without locks", writers=2, locks=False, loser=(0, REFUSED)),
        conversion(name="convert"),
        conversion(name="convert: two without locks", writers=2, locks=False, loser=(0, 1)),
        preparing(name="prepare"),
        preparing(name="prepare: two at a time", writers=2, loser=(0, REFUSED)),
        preparing(name="prepare: two without locks", writers=2, locks=False, loser=(0, REFUSED)),
        Scenario(
            name="repair", words=lambda path: ["repair", path], content=undamaged, reference=world.root / "zarr",
            start_from=damaged, again=(0, 1),
        ),
        *(
            Scenario(
                name=name, words=words, content=tree_content, reference=world.root / output,
                whole=same_as(world.root / output), again=again,
            )
            for name, words, output, again in (
                ("export", world.export, "draft", (0, REFUSED)),
                ("eval", world.evaluate, "eval.json", (0,)),
                ("vocab", world.vocab, "map.safetensors", (0,)),
                ("probe", world.probe, "probe.safetensors", (0, REFUSED)),
            )
        ),
        *map(reading, ("verify", "inspect")),
    ]  # fmt: skip
