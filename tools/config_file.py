"""Flags in a TOML file: `draftcache COMMAND --config FILE.toml`. Recipes hold the flags of each of their steps so too.

A key is a flag's name without its dashes, in kebab case or snake case, or the name of a positional argument. A value
has the flag's type: true or false for a switch, a list for a flag that takes a,b,c or that may be repeated, a table for
one that takes NAME=VALUE. Paths in a file are relative to the current directory, as flags are. Flags on the command
line win over the file's.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from draftcache.store.common.errors import InputError
from draftcache.store.common.files import require_file
from draftcache.tools.arguments import count, finite_number

Place = Callable[[str], str]
"""Returns where a key stands, such as `train.toml line 3`, for the beginning of an error."""

_NOT_KEYS = ("help", "config")


class RefusingParser(argparse.ArgumentParser):
    """A parser that raises InputError, where argparse would print the usage and end the process."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError with argparse's own words."""
        raise InputError(message)


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file. Raises InputError, which names the path, where it is missing or not TOML."""
    require_file(path, "a TOML file")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise InputError(f"{path}: expected TOML, found something else ({exc})") from exc


def line_of(text: str, key: str, section: str = "") -> int | None:
    """Return the number of the line on which a section's key stands in the text of a TOML file, or None.

    "" is the part before the first section. Without its key, a section's own line is returned.
    """
    current, header = "", None
    for number, line in enumerate(text.splitlines(), start=1):
        if found := re.match(r"\s*\[+\s*(.*?)\s*\]+\s*(#.*)?$", line):
            current = found[1]
            header = number if current == section else header
        elif current == section and (found := re.match(r"\s*[\"']?([\w.-]+)[\"']?\s*=", line)) and found[1] == key:
            return number
    return header


def place_in(path: Path, section: str = "") -> Place:
    """Return the `Place` of the keys of one section of a file."""

    def place(key: str) -> str:
        line = line_of(path.read_text(encoding="utf-8"), key, section)
        where = f"{path}" if line is None else f"{path} line {line}"
        return f"{where}, [{section}]" if section else where

    return place


def nearest(name: str, known: Collection[str]) -> str:
    """Return the end of a refusal of an unknown name: the nearest known one, or all of them where none is near."""
    close = difflib.get_close_matches(name, known, 1, 0.6)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(sorted(known))}"


def with_config(arguments: list[str], parsers: Callable[[], argparse.ArgumentParser]) -> list[str]:
    """Return a command's words with those of its --config file before them, less what the words give themselves.

    `arguments` are the words behind the command's name. `parsers` makes the command's parser, each time a new one.
    Raises InputError for a file with unknown keys or wrong values.
    """
    relaxed = _relaxed(parsers())
    given = vars(relaxed.parse_known_args(arguments)[0])
    if given.get("config") is None:
        return arguments
    path: Path = given["config"]
    parser = parsers()
    actions = actions_of(parser)
    overridden = set(_overridden(parser, given))
    values = {key: value for key, value in read_toml(path).items() if name_of(key) not in overridden}
    words = words_of(actions, values, place_in(path), parser.prog)
    return [*words, *arguments]


def name_of(key: str) -> str:
    """Return a key in snake case, as `actions_of` names arguments."""
    return key.replace("-", "_")


def actions_of(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Return the arguments that a file may hold, by their names in snake case; former names of flags are among them."""
    found = {}
    for action in parser._actions:
        name = action.option_strings[0].lstrip("-") if action.option_strings else action.dest
        found[name_of(name)] = action
    return {name: action for name, action in found.items() if name not in _NOT_KEYS}


def words_of(
    actions: Mapping[str, argparse.Action], values: Mapping[str, Any], place: Place, command: str
) -> list[str]:
    """Return command-line words for TOML values by key, positional arguments first.

    `actions` are those of `actions_of`. Raises InputError, which begins with the key's place, for an unknown key or a
    value that the argument does not take.
    """
    positional: list[str] = []
    flags: list[str] = []
    seen: dict[str, str] = {}
    for key, value in values.items():
        name = name_of(key)
        action = actions.get(name)
        if action is None:
            known = [item for item, one in actions.items() if one.dest != argparse.SUPPRESS]
            raise InputError(f"{place(key)}: expected a flag of `{command}`, found {key!r}: {nearest(name, known)}")
        if action.dest == argparse.SUPPRESS:  # a former name
            raise InputError(f"{place(key)}: expected the new name {str(action.const).lstrip('-')}, found {key!r}")
        if name in seen:
            raise InputError(f"{place(key)}: expected each flag once, found {seen[name]!r} and {key!r}")
        seen[name] = key
        try:
            words = _words(action, value)
        except InputError as exc:
            raise InputError(f"{place(key)}: {key}: {exc}") from exc
        (flags if action.option_strings else positional).extend(words)
    return [*positional, *flags]


def _words(action: argparse.Action, value: Any) -> list[str]:
    flag = action.option_strings[0] if action.option_strings else None
    if flag is not None and action.nargs == 0:
        if not isinstance(value, bool):
            raise InputError(f"expected true or false, found {value!r}")
        off = isinstance(action, argparse.BooleanOptionalAction)
        return [flag] if value else [action.option_strings[1]] if off else []
    if isinstance(action, argparse._AppendAction):
        return [word for text in _several(action, value) for word in _flagged(flag, text)]
    if action.nargs in ("+", "*"):
        texts = _several(action, value)
        return texts if flag is None else [flag, *texts]
    if isinstance(action.nargs, int):
        if not isinstance(value, list) or len(value) != action.nargs:
            raise InputError(f"expected a list of {action.nargs}, found {value!r}")
        return [*([] if flag is None else [flag]), *(_text(action, item) for item in value)]
    text = ",".join(_text(action, item) for item in value) if _takes_list(action, value) else _text(action, value)
    return _flagged(flag, _checked(action, text))


def _flagged(flag: str | None, text: str) -> list[str]:
    if flag is None:
        return [text]
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def _several(action: argparse.Action, value: Any) -> list[str]:
    """Return the texts of a list, of a table, as NAME=VALUE, or of a single value."""
    if isinstance(value, Mapping):
        pairs = [(name, one) for name, item in value.items() for one in (item if isinstance(item, list) else [item])]
        return [f"{name}={item if isinstance(item, str) else json.dumps(item)}" for name, item in pairs]
    return [_checked(action, _text(action, item)) for item in (value if isinstance(value, list) else [value])]


def _takes_list(action: argparse.Action, value: Any) -> bool:
    """Whether the value is a list, and the flag takes several values with commas between, as its help has to say."""
    if not isinstance(value, list):
        return False
    if action.type in (int, float, count, finite_number):
        return False
    plain = action.type in (None, str, Path)
    return not plain or "comma-separated" in (action.help or "") or "," in str(action.metavar or "")


def _text(action: argparse.Action, value: Any) -> str:
    """Return the text of one value. Raises InputError where its type is not the argument's."""
    kinds: dict[Any, tuple[str, tuple[type, ...]]] = {
        int: ("a whole number", (int,)),
        count: ("a whole number", (int, float)),
        float: ("a number", (int, float)),
        finite_number: ("a number", (int, float)),
        Path: ("a path in quotes", (str,)),
        str: ("text in quotes", (str,)),
        None: ("text in quotes", (str,)),
    }
    expected, types = kinds.get(action.type, ("text, a number or a list of them", (str, int, float)))
    if not isinstance(value, types) or isinstance(value, bool):
        raise InputError(f"expected {expected}, found {_shown(value)}")
    return str(value)


def _checked(action: argparse.Action, text: str) -> str:
    """Return the text. Raises InputError where the argument's own conversion or choices refuse it."""
    convert: Callable[[str], Any] = action.type if callable(action.type) else str
    try:
        value = convert(text)
    except argparse.ArgumentTypeError as exc:
        raise InputError(str(exc)) from exc
    except (TypeError, ValueError) as exc:
        raise InputError(f"expected a value that --help names, found {text!r}") from exc
    if action.choices is not None and value not in action.choices:
        raise InputError(f"expected one of {list(action.choices)}, found {text!r}")
    return text


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)


def _overridden(parser: argparse.ArgumentParser, given: Mapping[str, Any]) -> Iterable[str]:
    """Yield the names of arguments that the command line gives, or that exclude one which it gives."""
    groups = [group._group_actions for group in parser._mutually_exclusive_groups]
    for name, action in actions_of(parser).items():
        together = [action, *(one for group in groups if action in group for one in group)]
        if any(one.dest in given for one in together):
            yield name


def _relaxed(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Make every argument optional and without a default, so that a parsed namespace holds what was given alone."""
    for action in parser._actions:
        action.required, action.default = False, argparse.SUPPRESS
        if not action.option_strings:
            action.nargs = "?" if action.nargs is None else "*" if action.nargs == "+" else action.nargs
    for group in parser._mutually_exclusive_groups:
        group.required = False
    return parser


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the flag --config, which `with_config` obeys."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="TOML file of this command's flags, by name; flags that are given here win over the file's",
    )


def command_parser(add_arguments: Callable[[argparse.ArgumentParser], None], command: str) -> argparse.ArgumentParser:
    """Return the parser of one command, which raises InputError instead of printing the usage."""
    parser = RefusingParser(prog=f"draftcache {command}", add_help=False)
    add_arguments(parser)
    add_common(parser)
    return parser


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add what every command takes."""
    add_config(parser)
    parser.add_argument("--debug", action="store_true", help="print the trace of an error")
