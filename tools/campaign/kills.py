"""SIGKILL at any instant: what was committed stays, and the same command makes what an uninterrupted one makes."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

from draftcache.store.common.errors import DraftcacheError
from draftcache.tools.campaign.processes import run, start
from draftcache.tools.campaign.scenarios import Scenario
from draftcache.tools.campaign.tally import Tally


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
