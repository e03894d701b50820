"""The command line beside the surface that is frozen in cli_surface.json: a change of it is made on purpose or not."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import pytest

from support.cli_surface import (
    FROZEN,
    arguments_of,
    differences,
    live_surface,
    parser_of,
    read_surface,
    write_surface,
)

REGENERATE = "DRAFTCACHE_WRITE_SURFACE=1 python -m pytest tests/test_tools_cli_surface.py"


def test_every_command_has_the_arguments_that_are_frozen() -> None:
    if os.environ.get("DRAFTCACHE_WRITE_SURFACE") == "1":
        write_surface()
    found = differences(read_surface(), live_surface())
    listed = "".join(f"\n  {line}" for line in found)
    assert not found, f"the command line is not what {FROZEN.name} says:{listed}\nif that is meant: {REGENERATE}"


def action_of(parser: argparse.ArgumentParser, flag: str) -> argparse.Action:
    return next(action for action in parser._actions if flag in action.option_strings)


def change_default(parser: argparse.ArgumentParser) -> None:
    action_of(parser, "--epochs").default = 12345


def change_help(parser: argparse.ArgumentParser) -> None:
    action_of(parser, "--epochs").help = "other words"


def change_requirement(parser: argparse.ArgumentParser) -> None:
    action_of(parser, "--epochs").required = True


def remove(parser: argparse.ArgumentParser) -> None:
    parser._actions.remove(action_of(parser, "--epochs"))


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epoch-count", type=int, default=3)


@pytest.mark.parametrize(
    ("change", "noticed"),
    [
        (change_default, "train --epochs: default was "),
        (change_help, "train --epochs: help was "),
        (change_requirement, "train --epochs: required was none, is true"),
        (remove, "train --epochs: was removed"),
        (add, "train --epoch-count: was added"),
    ],
)
def test_a_change_is_noticed_by_name(change: Callable[[argparse.ArgumentParser], None], noticed: str) -> None:
    """Negative control: each change is one line, of the one flag that it is made to."""
    before, after, parser = live_surface(), live_surface(), parser_of("train")
    change(parser)
    after["train"]["arguments"] = arguments_of(parser)
    (line,) = differences(before, after)
    assert line.startswith(noticed)


def test_a_command_that_comes_or_goes_is_noticed() -> None:
    whole, part = live_surface(), live_surface()
    del part["verify"]
    assert differences(whole, part) == ["verify: the command was removed"]
    assert differences(part, whole) == ["verify: the command was added"]


def test_neither_order_nor_the_terminals_width_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = live_surface()
    monkeypatch.setenv("COLUMNS", "20")
    narrow = {
        name: {"help": one["help"], "arguments": dict(reversed(one["arguments"].items()))}
        for name, one in reversed(live_surface().items())
    }
    assert list(narrow) != list(wide)
    assert differences(wide, narrow) == []
