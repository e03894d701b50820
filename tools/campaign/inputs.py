"""Flags, files, rows and verifiers that are wrong: refused with exit code 2, or set aside and counted."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

from draftcache.tools.campaign.processes import run
from draftcache.tools.campaign.tally import Tally
from draftcache.tools.campaign.world import World
from draftcache.tools.campaign.wrong_content import WRONG_FILES, WRONG_ROWS, make_directory
from draftcache.tools.cli import COMMANDS
from draftcache.tools.demo.pipeline import VERIFIER

SET_ASIDE, REFUSED = (1,), (2,)
ANY = (0, 1, 2)
"""Codes for what may be right or wrong by the flag, but is never a crash."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command that is wrong in one thing. `make` writes what it needs into a directory and returns the words."""

    name: str
    make: Callable[[Path], list[object]]
    codes: tuple[int, ...]


def try_all(world: World, root: Path, random_: random.Random, attempts: int) -> Tally:
    """Run this many of the cases, in random order, and count what is not refused as it should be."""
    tally = Tally("wrong inputs")
    cases = list(all_cases(world))
    random_.shuffle(cases)
    for case in cases[:attempts]:
        place = root / "wrong"
        place.mkdir()
        tally.attempts += 1
        tally.judge(run(case.make(place)), case.codes, case.name)
        shutil.rmtree(place)
    return tally


def all_cases(world: World) -> Iterator[Case]:
    """Yield every case there is."""
    right = _right_commands(world)
    yield from _numbers(right)
    yield from _choices(right)
    yield from _paths(right)
    yield from _rows(world)
    yield from _verifiers(world)


def _right_commands(world: World) -> dict[str, Callable[[Path], list[object]]]:
    """Return a command line that works, for every command whose flags are tried."""
    root = world.root
    return {
        "prepare": lambda place: world.prepare(place / "out"),
        "vocab": lambda place: world.vocab(place / "out"),
        "capture": lambda place: world.capture(place / "out"),
        "train": lambda place: world.train(place / "out"),
        "eval": lambda place: world.evaluate(place / "out"),
        "export": lambda place: world.export(place / "out"),
        "probe": lambda place: world.probe(place / "out"),
        "convert": lambda place: world.convert(place / "out", "webdataset"),
        "verify": lambda place: ["verify", root / "zarr"],
        "inspect": lambda place: ["inspect", root / "zarr"],
        "size": lambda place: ["size", "--verifier", VERIFIER, "--layers", "2,5,10", "--tokens", 1000000],
    }


def _with(make: Callable[[Path], list[object]], more: list[object]) -> Callable[[Path], list[object]]:
    return lambda place: [*make(place), *more]


def _numbers(right: Mapping[str, Callable[[Path], list[object]]]) -> Iterator[Case]:
    """Yield every flag that takes a number, with what is none, and with numbers that may be out of range."""
    for command, make in right.items():
        parser = argparse.ArgumentParser()
        import_module(COMMANDS[command][0]).add_arguments(parser)
        for action in parser._actions:
            if not action.option_strings or not _is_numeric(action):
                continue
            flag = action.option_strings[0]
            for value in ("nan", "inf", "1e999", "many", ""):
                yield Case(name=f"{command} {flag}", make=_with(make, [f"{flag}={value}"]), codes=REFUSED)
            for value in ("-1", "0"):
                yield Case(name=f"{command} {flag}", make=_with(make, [f"{flag}={value}"]), codes=ANY)


def _is_numeric(action: argparse.Action) -> bool:
    convert = action.type
    if not callable(convert):
        return False
    try:
        value = convert("1")
        convert("many")
    except (ValueError, argparse.ArgumentTypeError):
        return isinstance(value, int | float)
    return False


def _choices(right: Mapping[str, Callable[[Path], list[object]]]) -> Iterator[Case]:
    """Yield flags with names that don't exist, and combinations that make no sense."""
    wrong = {
        "prepare": (["--turns-of", "x"], ["--chat-template", "missing.jinja"], ["train=missing.jsonl"], ["=x.jsonl"]),
        "capture": (
            ["--splits", "train,train"], ["--splits", "trian"], ["--layers", "10,5"],
            ["--layers", "2,99"], ["--layers", "-1"], ["--layers", "a"], ["--device", "foo"], ["--device", "cuda:99"],
            ["--layout", "csv"], ["--mode", "int3"], ["--compute-dtype", "int8"], ["--teacher", "none"],
            ["--vocab-map", "missing.safetensors"], ["--shard", "2"], ["--engine", "ray"],
        ),
        "train": (
            ["--splits", "val,val"], ["--splits", "trian"], ["--eval-split", "val"], ["--device", "foo"],
            ["--eval-split", "vla", "--eval-every", 2], ["--draft", "eagle9"], ["--order", "none"],
            ["--head-init", "zeros"], ["--track", "yes"], ["--init-from", "missing"], ["--draft-vocab-size", 77],
            ["--attention", "flash9"], ["--compute", "slow"],
        ),
        "eval": (["--splits", "vla"], ["--splits", "val,val"], ["--device", "foo"], ["--bigram-splits", "trian"]),
        "export": (["--engine", "none"], ["--dtype", "int8"]),
        "convert": (["--layout", "csv"], ["--mode", "int3"]),
        "probe": (["--layers", "x"], ["--device", "foo"], ["--token-ids", "99999999"], ["--compare", "a", "b"]),
        "verify": (["--unknown"],),
    }  # fmt: skip
    for command, flags in wrong.items():
        for more in flags:
            name = f"{command} {' '.join(map(str, more))}"
            yield Case(name=name, make=_with(right[command], list(more)), codes=REFUSED)
    yield Case(name="no command", make=lambda place: [], codes=REFUSED)
    yield Case(name="unknown command", make=lambda place: ["captrue"], codes=REFUSED)


def _paths(right: Mapping[str, Callable[[Path], list[object]]]) -> Iterator[Case]:
    """Yield every path that a command reads or writes, with something wrong there."""
    read = {
        "prepare": ("--tokenizer", "--chat-template", "train="), "capture": ("--verifier", "--dataset", "--vocab-map"),
        "train": ("--store", "--init-from"), "eval": ("--store", "--checkpoint"), "export": ("--checkpoint",),
        "convert": (1,), "verify": (1,), "inspect": (1,), "vocab": (-1,), "probe": ("--verifier",),
        "size": ("--verifier",),
    }  # fmt: skip
    for command, flags in read.items():
        for flag in flags:
            for kind in WRONG_FILES:
                make = partial(_with_path, right[command], flag, kind)
                yield Case(name=f"{command} {flag}: {kind}", make=make, codes=REFUSED)
    for command in ("prepare", "capture", "train", "export", "convert"):
        for kind in ("a directory of something else", "a pipe", "a link to itself", "random bytes"):
            if command == "train" and kind.startswith("a directory"):
                continue  # a run may begin in a directory with notes in it
            make = partial(_with_output, right[command], kind)
            yield Case(name=f"{command} to {kind}", make=make, codes=REFUSED)
    for command in ("eval", "vocab", "probe"):
        for kind in ("a directory of something else", "a link to itself"):
            make = partial(_with_output, right[command], kind)
            yield Case(name=f"{command} to {kind}", make=make, codes=ANY if "link" in kind else REFUSED)


def _with_path(right: Callable[[Path], list[object]], flag: str | int, kind: str, place: Path) -> list[object]:
    path = place / "wrong"
    WRONG_FILES[kind](path)
    words = right(place)
    if isinstance(flag, int):
        return [*words[:flag], path, *(words[flag + 1 :] if flag != -1 else [])]
    if flag.endswith("="):
        return [f"{flag}{path}" if str(word).startswith(flag) else word for word in words]
    return [*words, flag, path]


def _with_output(right: Callable[[Path], list[object]], kind: str, place: Path) -> list[object]:
    WRONG_FILES[kind](place / "out")
    return right(place)


def _rows(world: World) -> Iterator[Case]:
    """Yield a file for each wrong row, between rows that are right."""

    def make(row: str, place: Path) -> list[object]:
        lines = (world.root / "train.jsonl").read_text(encoding="utf-8").splitlines()
        (place / "rows.jsonl").write_text("\n".join([lines[0], row, *lines[1:]]) + "\n", encoding="utf-8")
        words = world.prepare(place / "out")
        return [f"train={place / 'rows.jsonl'}" if str(word).startswith("train=") else word for word in words]

    for row in WRONG_ROWS:
        # An empty line is no row.
        yield Case(name=f"row {row[:60]!r}", make=partial(make, row), codes=SET_ASIDE if row else (0,))


def _verifiers(world: World) -> Iterator[Case]:
    """Yield verifiers with one thing wrong in their directory."""

    def config(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
        def edit(path: Path) -> None:
            values = json.loads((path / "config.json").read_text(encoding="utf-8"))
            change(values)
            (path / "config.json").write_text(json.dumps(values), encoding="utf-8")

        return edit

    def cut(path: Path) -> None:
        data = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(data[: len(data) // 2])

    def text(name: str, content: str) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            (path / name).write_text(content, encoding="utf-8")

        return write

    def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
        def replace(path: Path) -> None:
            (path / name).unlink()
            make(path / name)

        return replace

    changes: dict[str, Callable[[Path], object]] = {
        "no config": lambda path: (path / "config.json").unlink(),
        "a config that is no JSON": text("config.json", "{"),
        "a config that is a list": text("config.json", "[]"),
        "an empty config": text("config.json", "{}"),
        "a directory as its config": replaced("config.json", make_directory),
        "a pipe as its config": replaced("config.json", os.mkfifo),
        "a pipe as its weights": replaced("model.safetensors", os.mkfifo),
        "an infinite size": text("config.json", '{"model_type": "nemotron_h", "hidden_size": Infinity}'),
        "no weights": lambda path: (path / "model.safetensors").unlink(),
        "half the weights": cut,
        "empty weights": text("model.safetensors", ""),
        "weights that are text": text("model.safetensors", "weights"),
        "an unknown model": config(lambda values: values.update(model_type="unheard-of")),
        "another width": config(lambda values: values.update(hidden_size=128)),
        "another vocabulary": config(lambda values: values.update(vocab_size=100)),
        "a negative width": config(lambda values: values.update(hidden_size=-1)),
        "a width that is text": config(lambda values: values.update(hidden_size="wide")),
        "an index of other files": text("model.safetensors.index.json", '{"weight_map": {"a": "gone.safetensors"}}'),
    }

    def make(change: Callable[[Path], object], place: Path) -> list[object]:
        shutil.copytree(VERIFIER, place / "verifier")
        change(place / "verifier")
        return [*world.capture(place / "out"), "--verifier", place / "verifier"]

    for name, change in changes.items():
        yield Case(name=f"a verifier with {name}", make=partial(make, change), codes=REFUSED)
