"""What is killed: every command that writes, alone and two at a time, and those that only read."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from draftcache.store.common.errors import DraftcacheError
from draftcache.tools.campaign.processes import Ended, call, run
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


def scenarios(world: World, scratch: Path) -> list[Scenario]:
    """Return all scenarios over a world. `scratch` is a directory for what checks write."""
    return [
        *_captures(world),
        *_trainings(world, scratch),
        *_conversions(world),
        *_preparations(world),
        *_others(world),
    ]


def _captures(world: World) -> list[Scenario]:
    def capture(layout: str, **more: Any) -> Scenario:
        return Scenario(
            words=lambda path: world.capture(path, layout=layout),
            content=store_content, reference=world.root / layout, whole=_verified, kept=committed, **more,
        )  # fmt: skip

    return [
        capture("zarr", name="capture: zarr"),
        capture("webdataset", name="capture: webdataset"),
        capture("zarr", name="capture: two at a time", writers=2),
        capture("zarr", name="capture: two without locks", writers=2, locks=False),
    ]


def _trainings(world: World, scratch: Path) -> list[Scenario]:
    def exportable(path: Path) -> Ended | None:
        if not any((path / "checkpoints").glob("step_*")):
            return None
        shutil.rmtree(scratch, ignore_errors=True)
        return run(world.export(scratch, path))

    train = partial(
        Scenario, words=world.train, content=run_content, reference=world.root / "run", whole=exportable
    )  # fmt: skip
    return [
        train(name="train"),
        train(name="train: two at a time", writers=2, loser=(0, REFUSED)),
        train(name="train: two without locks", writers=2, locks=False, loser=(0, REFUSED)),
    ]


def _conversions(world: World) -> list[Scenario]:
    convert = partial(
        Scenario, words=lambda path: world.convert(path, "webdataset"), content=store_content, whole=_verified,
        kept=committed, reference=world.root / "converted-webdataset",
    )  # fmt: skip
    return [
        convert(name="convert"),
        convert(name="convert: two without locks", writers=2, locks=False, loser=(0, 1)),
    ]


def _preparations(world: World) -> list[Scenario]:
    prepare = partial(
        Scenario, words=world.prepare, content=tree_content, reference=world.root / "prepared",
        whole=lambda path: run(["verify", path]),
    )  # fmt: skip
    return [
        prepare(name="prepare"),
        prepare(name="prepare: two at a time", writers=2, loser=(0, REFUSED)),
        prepare(name="prepare: two without locks", writers=2, locks=False, loser=(0, REFUSED)),
    ]


def _others(world: World) -> list[Scenario]:
    def single(name: str, words: Callable[[Path], list[object]], output: str, **more: Any) -> Scenario:
        """A command whose result appears whole or not at all."""
        reference = world.root / output
        return Scenario(
            name=name, words=words, content=tree_content, reference=reference, whole=partial(_same, reference), **more
        )

    def copied(path: Path) -> None:
        shutil.copytree(world.root / "zarr", path)

    def damaged(path: Path) -> None:
        copied(path)
        victim = min((path / "shards" / "00001").glob("tap_2_lo/**/c*"))
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)

    def captured_again(path: Path) -> dict[str, Any]:
        run(world.capture(path))
        return store_content(path)

    return [
        Scenario(
            name="repair", words=lambda path: ["repair", path], content=captured_again,
            reference=world.root / "zarr", start_from=damaged, again=(0, 1),
        ),
        single("export", world.export, "draft", again=(0, REFUSED)),
        single("eval", world.evaluate, "eval.json"),
        single("vocab", world.vocab, "map.safetensors"),
        single("probe", world.probe, "probe.safetensors", again=(0, REFUSED)),
        single("verify", lambda path: ["verify", path], "zarr", start_from=copied),
        single("inspect", lambda path: ["inspect", path], "zarr", start_from=copied),
    ]  # fmt: skip


def _verified(path: Path) -> Ended | None:
    return run(["verify", path, "--allow-partial"]) if (path / "manifest.json").exists() else None


def _same(reference: Path, path: Path) -> Ended:
    def compare() -> str:
        if tree_content(path) != tree_content(reference):
            raise DraftcacheError(f"{path}: half of a result")
        return "equal"

    return call(compare)
