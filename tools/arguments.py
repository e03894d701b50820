"""Turns a settings dataclass into command-line flags: one flag per field, with the help of the field's metadata."""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from draftcache.store.common.errors import InputError

Settings = TypeVar("Settings")


def add_settings(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup, settings: type[Any], only: tuple[str, ...] = ()
) -> None:
    """Add one `--kebab-case` flag per field of `settings`, or per field that `only` names.

    The flag of a field without a default is required. The flag of a tuple takes a,b,c. A field's metadata may hold
    `words`, values by the texts that stand for them.
    """
    hints = typing.get_type_hints(settings)
    for item in dataclasses.fields(settings):
        if only and item.name not in only:
            continue
        flag = "--" + item.name.replace("_", "-")
        required = item.default is dataclasses.MISSING
        help_text = item.metadata.get("help", "").replace("%", "%%")  # argparse formats help texts with %
        if hints[item.name] is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=item.default, help=help_text)
            continue
        if not required and item.default not in (None, (), ""):
            help_text += f" (default: {item.default})".replace("%", "%%")
        parser.add_argument(
            flag,
            required=required,
            default=None if required else item.default,
            type=_converter(hints[item.name], item.metadata.get("words", {})),
            help=help_text,
            metavar=item.name.upper(),
        )


def read_settings(settings: type[Settings], arguments: argparse.Namespace) -> Settings:
    """Return the dataclass, built from parsed flags. Raises InputError if the dataclass's checks refuse a value."""
    names = [item.name for item in dataclasses.fields(settings)]  # type: ignore[arg-type]
    return settings(**{name: getattr(arguments, name) for name in names})


def finite_number(text: str) -> float:
    """Return the number that a flag gives. Raises ArgumentTypeError for infinity, NaN, and what is no number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a finite number, found {text!r}")
    return number


def count(text: str) -> int:
    """Return a count, which may be written as 450e6. Raises ArgumentTypeError for what is no whole number >= 0."""
    number = finite_number(text)
    if number < 0 or number != int(number):
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 0, found {text!r}")
    return int(number)


def numbers(text: str) -> tuple[int, ...]:
    """Return the whole numbers of a,b,c. Raises ValueError, which argparse reports, for what is none."""
    return tuple(int(part) for part in text.split(",") if part)


def refuse_renamed(parser: argparse.ArgumentParser, renamed: Mapping[str, str]) -> None:
    """Refuse the flags of former versions with an InputError that names the new flag. `renamed` is {old: new}.

    --help does not show the old flags. Because the parser knows them, it does not take them for abbreviations of longer
    flags either (`--shard` for `--shard-tokens`).
    """
    for old, new in renamed.items():
        parser.add_argument(old, action=_Refusal, nargs="?", const=new, dest=argparse.SUPPRESS, help=argparse.SUPPRESS)


class _Refusal(argparse.Action):
    """Raises InputError when its flag is parsed, which is before argparse reports missing required flags."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> NoReturn:
        raise InputError(f"{self.option_strings[0]}: expected the flag's new name {self.const}, found the old one")


def _converter(hint: Any, words: Mapping[str, Any]) -> Any:
    convert = _plain_converter(hint)
    if not words:
        return convert

    def word_or_value(text: str) -> Any:
        return words[text] if text in words else convert(text)

    return word_or_value


def _plain_converter(hint: Any) -> Any:
    if isinstance(hint, types.UnionType):
        hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        convert = typing.get_args(hint)[0]

        def comma_separated(text: str) -> tuple[Any, ...]:
            return tuple(convert(part) for part in text.split(",") if part)

        return comma_separated
    return {Path: Path, int: int, float: finite_number, str: str}[hint]
