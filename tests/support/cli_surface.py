"""The command line's surface: what every argument of every subcommand is, in values that JSON holds.

Read from argparse's own records and not from printed help, so that no terminal's width and no version of Python shows.
"""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from draftcache.tools.cli import COMMANDS
from support.paths import ROOT

Surface = dict[str, dict[str, Any]]
"""By subcommand: `help`, its line in the list of commands, and `arguments`, by flags or name: what each one is."""

FROZEN = ROOT / "tests" / "cli_surface.json"
OF_PYTHON_3_11 = " (default: %(default)s)"
"""What argparse adds there to the help of flags that are switched on or off, and newer ones do not."""


def parser_of(command: str) -> argparse.ArgumentParser:
    """Make the parser of one subcommand, as `draftcache COMMAND` does."""
    parser = argparse.ArgumentParser(prog=f"draftcache {command}")
    importlib.import_module(COMMANDS[command][0]).add_arguments(parser)
    return parser


def arguments_of(parser: argparse.ArgumentParser) -> dict[str, dict[str, Any]]:
    """Describe every argument but --help, by its flags (`--json`, `-j, --json`) or by the name of a positional."""
    flags = [action for action in parser._actions if action.option_strings]
    found = {", ".join(action.option_strings): _described(action) for action in flags if action.dest != "help"}
    positionals = [action for action in parser._actions if not action.option_strings]
    return found | {action.dest: {"place": place} | _described(action) for place, action in enumerate(positionals)}


def live_surface() -> Surface:
    """Read the surface of the subcommands as they are now."""
    return {name: {"help": line, "arguments": arguments_of(parser_of(name))} for name, (_, line) in COMMANDS.items()}


def read_surface(path: Path = FROZEN) -> Surface:
    """Read the surface that a file holds."""
    found: Surface = json.loads(path.read_text(encoding="utf-8"))
    return found


def write_surface(path: Path = FROZEN) -> None:
    """Write the surface of the subcommands as they are now to a file."""
    path.write_text(json.dumps(live_surface(), indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def differences(frozen: Surface, live: Surface) -> list[str]:
    """Say in one line each what is not the same in both: the command, the argument, what it was and what it is."""
    found = []
    for command in sorted(frozen.keys() | live.keys()):
        if command not in frozen or command not in live:
            found.append(f"{command}: the command was {'added' if command in live else 'removed'}")
            continue
        old, new = frozen[command], live[command]
        found += _changes(command, {"help": old["help"]}, {"help": new["help"]})
        for argument in sorted(old["arguments"].keys() | new["arguments"].keys()):
            if argument not in old["arguments"] or argument not in new["arguments"]:
                found.append(f"{command} {argument}: was {'added' if argument in new['arguments'] else 'removed'}")
                continue
            found += _changes(f"{command} {argument}", old["arguments"][argument], new["arguments"][argument])
    return found


def _described(action: argparse.Action) -> dict[str, Any]:
    """Return an argument's default, and of everything else about it what argparse was told."""
    text = action.help
    if isinstance(action, argparse.BooleanOptionalAction) and text is not None:
        text = text.removesuffix(OF_PYTHON_3_11)
    own_name = (action.option_strings or [action.dest])[0].lstrip("-").replace("-", "_")
    told = {
        "dest": action.dest if action.dest != own_name else None,
        "action": type(action).__name__.strip("_").removesuffix("Action"),
        "type": getattr(action.type, "__name__", None),
        "choices": _plain(action.choices),
        "nargs": action.nargs,
        "const": None if isinstance(action.const, bool) else _plain(action.const),
        "required": action.required or None,
        "metavar": _plain(action.metavar),
        "help": text,
    }
    return {"default": _plain(action.default)} | {name: value for name, value in told.items() if value is not None}


def _plain(value: Any) -> Any:
    """Return the value as JSON holds it, and refuse what it cannot hold: other machines might write that otherwise."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    raise TypeError(f"expected plain values in the command line's surface, found {value!r}")


def _changes(where: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Say in one line each which properties differ; they are compared as JSON, where 1 is neither 1.0 nor true."""
    texts = [{name: json.dumps(value, ensure_ascii=False) for name, value in one.items()} for one in (old, new)]
    names = sorted(texts[0].keys() | texts[1].keys())
    was, now = ({name: one.get(name, "none") for name in names} for one in texts)
    return [f"{where}: {name} was {was[name]}, is {now[name]}" for name in names if was[name] != now[name]]
