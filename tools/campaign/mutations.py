"""Stores, datasets and checkpoints with one change: it is found, and never read as if nothing had been changed."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from draftcache.capture.prepare.token_dataset import TokenDataset
from draftcache.store.common.errors import DraftcacheError
from draftcache.tools.campaign.processes import Ended, call, run
from draftcache.tools.campaign.tally import Tally
from draftcache.tools.campaign.world import World, run_content, store_content, store_reading, tree_content

DAMAGED, REFUSED = 1, 2
KINDS = ("byte", "cut", "grown", "deleted", "exchanged", "foreign")
"""One byte is another one; the file is shorter; longer; gone; has changed its place with another file of the tree; or
is that of another tree, of the same name."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """A tree of files, another one of its kind, and what tells that it was changed."""

    name: str
    tree: Path
    other: Path
    judge: Callable[[Path], list[tuple[Ended, tuple[int, ...]]]]
    """Runs commands over a changed tree; each comes with the exit codes that say that it was noticed."""
    read: Callable[[Path], str] | None = None
    """Reads everything, and returns what distinguishes its content."""
    heal: Callable[[Path], dict[str, object]] | None = None
    """Repairs a changed tree by the commands that are there for it, and returns its content."""
    healed: dict[str, object] | None = None


def change_again_and_again(target: Target, root: Path, random_: random.Random, changes: int) -> Tally:
    """Change the target's tree this many times, in one place each, and count what goes unnoticed."""
    tally = Tally(target.name)
    place = root / "changed"
    shutil.copytree(target.tree, place)
    read = None if target.read is None else partial(target.read, place)
    expected = "" if read is None else call(read).output
    names = sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if _is_content(path, place))
    while tally.attempts < changes:
        before = {name: (place / name).read_bytes() for name in _victims(names, random_)}
        what = _change(place, target.other, list(before), random_)
        if what is None or all(
            (place / name).exists() and (place / name).read_bytes() == data for name, data in before.items()
        ):
            _restore(place, before)
            continue  # the other file has the same content
        tally.attempts += 1
        for ended, codes in target.judge(place):
            tally.judge(ended, codes, what)
        if read is not None:
            reading = call(read)
            if reading.has_trace:
                tally.fault("tracebacks", f"{what}: reading: {reading}")
            elif reading.code == 0 and reading.output != expected:
                tally.fault("undetected", f"{what}: read without an error, and is not what was written")
        if target.heal is not None and random_.random() < 0.02 and "manifest.json" not in before:
            _heal(tally, target, what, place)
            shutil.rmtree(place)
            shutil.copytree(target.tree, place)
        _restore(place, before)
    shutil.rmtree(place)
    return tally


def _is_content(path: Path, place: Path) -> bool:
    """Return whether a file holds what is trusted later: locks and a run's log don't."""
    hidden = any(part.startswith(".") for part in path.relative_to(place).parts)
    return path.is_file() and not hidden and path.name != "metrics.jsonl" and path.stat().st_size > 0


def _victims(names: list[str], random_: random.Random) -> list[str]:
    """Draw two names. A store has many arrays' files and few others: these are drawn as often."""
    few = [name for name in names if "shards/" not in name]
    return [random_.choice(few if few and random_.random() < 0.5 else names) for _ in range(2)]


def _change(place: Path, other: Path, victims: list[str], random_: random.Random) -> str | None:
    """Change the tree, and return what was done; None where this change is not possible here."""
    kind = random_.choice(KINDS)
    path = place / victims[0]
    data = path.read_bytes()
    at = random_.randrange(len(data))
    if kind == "byte":
        changed = bytearray(data)
        changed[at] ^= random_.randrange(1, 256)
        path.write_bytes(changed)
        return f"{victims[0]}: byte {at} of {len(data)}: {data[at]} -> {changed[at]}"
    if kind == "cut":
        path.write_bytes(data[:at])
        return f"{victims[0]}: cut to {at} of {len(data)} bytes"
    if kind == "grown":
        path.write_bytes(data + data[at:])
        return f"{victims[0]}: grown by {len(data) - at} bytes"
    if kind == "deleted":
        path.unlink()
        return f"{victims[0]}: deleted"
    if kind == "exchanged":
        if len(victims) < 2:
            return None
        second = place / victims[1]
        theirs = second.read_bytes()
        second.write_bytes(data)
        path.write_bytes(theirs)
        return f"{victims[0]}: exchanged with {victims[1]}"
    if not (other / victims[0]).is_file():
        return None
    path.write_bytes((other / victims[0]).read_bytes())
    return f"{victims[0]}: that of another one"


def _restore(place: Path, before: dict[str, bytes]) -> None:
    for name, data in before.items():
        (place / name).write_bytes(data)


def _heal(tally: Tally, target: Target, what: str, place: Path) -> None:
    try:
        found = target.heal(place) if target.heal is not None else None
    except DraftcacheError as exc:
        tally.fault("lost", f"{what}: {exc}")
        return
    if found != target.healed:
        tally.fault("lost", f"{what}: repaired and captured again, the store is not what it was")


def targets(world: World, scratch: Path) -> list[Target]:
    """Return stores of both layouts, a prepared dataset, and a checkpoint."""

    def verified(path: Path) -> list[tuple[Ended, tuple[int, ...]]]:
        return [(run(["verify", path]), (DAMAGED, REFUSED))]

    def captured_again(layout: str) -> Callable[[Path], dict[str, object]]:
        def heal(path: Path) -> dict[str, object]:
            for words in (["repair", path], world.capture(path, layout=layout), ["verify", path]):
                ended = run(words)
                if ended.code not in (0, 1) or (ended.code == 1 and words[0] != "repair"):
                    raise DraftcacheError(f"{ended}")
            return store_content(path)

        return heal

    def used(path: Path) -> list[tuple[Ended, tuple[int, ...]]]:
        """Export the draft and go on with its training: refused, or as if nothing were changed."""
        shutil.rmtree(scratch, ignore_errors=True)
        exported = run(world.export(scratch, path))
        same = exported.code != 0 or tree_content(scratch) == tree_content(world.root / "draft")
        resumed = run(world.train(path))
        same = same and (resumed.code != 0 or run_content(path) == run_content(world.root / "run"))
        # A change of a checkpoint that neither reads leaves both results as they are.
        return [(exported, (0, REFUSED) if same else (REFUSED,)), (resumed, (0, REFUSED) if same else (REFUSED,))]

    def dataset_reading(path: Path) -> str:
        dataset = TokenDataset.open(path)
        splits = {name: dataset.split(name) for name in dataset.splits}
        rows = {name: [split[number][2] for number in range(len(split))] for name, split in splits.items()}
        counts = {name: split.token_counts.tolist() for name, split in splits.items()}
        return json.dumps([rows, counts, dataset.held_out, dataset.tokenizer_hash])

    stores = [
        Target(
            name=f"store:{layout}", tree=world.root / layout, other=world.root / f"other-{layout}", judge=verified,
            read=store_reading, heal=captured_again(layout), healed=store_content(world.root / layout),
        )
        for layout in ("zarr", "webdataset")
    ]  # fmt: skip
    return [
        *stores,
        Target(
            name="prepared dataset", tree=world.root / "prepared", other=world.root / "other-prepared", judge=verified,
            read=dataset_reading,
        ),
        Target(name="checkpoint", tree=world.root / "run", other=world.root / "other-run", judge=used),
    ]  # fmt: skip
