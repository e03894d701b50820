"""A recipe's variables: their values, `--set`, what `[when]` changes of them, and their places in texts.

`"{name}"` alone is the variable's value with its type. Within other text it is the value's text.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from draftcache.store.common.errors import InputError
from draftcache.tools.config_file import Place, nearest

_NAME = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_CONDITION = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*)\s*(==|!=|>=|<=|>|<)\s*(.+?)\s*")


def parse_set(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse NAME=VALUE pairs of --set; a value is TOML where it is that, else text. Raises InputError."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            raise InputError(f"--set {pair}: expected NAME=VALUE")
        if name in found:
            raise InputError(f"--set {name}: expected each name once, found it twice")
        found[name] = _toml_or_text(text)
    return found


def _toml_or_text(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def merge(defaults: Mapping[str, Any], given: Mapping[str, Any], needed: Mapping[str, str]) -> dict[str, Any]:
    """Return the variables: what --set gives, else the recipe's own values.

    `needed` holds by name what a variable without a value of its own is for. Raises InputError for unknown names, for
    values of another type, and where one that is needed is not given.
    """
    known = {**defaults, **needed}
    for name, value in given.items():
        if name not in known:
            raise InputError(f"--set {name}: expected a variable of the recipe, found none: {nearest(name, known)}")
        if name in defaults and not _same_type(value, defaults[name]):
            raise InputError(f"--set {name}: expected a value like {defaults[name]!r}, found {value!r}")
    if missing := [name for name in needed if name not in given]:
        listed = "; ".join(f"--set {name}=... ({needed[name]})" for name in missing)
        raise InputError(f"expected values for {missing}, found none: give {listed}")
    return {**{name: given[name] for name in needed}, **defaults, **given}


def _same_type(value: Any, like: Any) -> bool:
    if isinstance(like, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(like, bool)
    if like == "auto" or isinstance(like, str):
        return isinstance(value, str) or like == "auto"
    if isinstance(like, float):
        return isinstance(value, int | float) or value == "auto"
    if isinstance(like, int):
        return isinstance(value, int) or value == "auto"
    return isinstance(value, type(like))


def holds(condition: str, variables: Mapping[str, Any], place: str) -> bool:
    """Return whether `NAME OPERATOR VALUE` holds, VALUE as in TOML. Raises InputError for any other text."""
    found = _CONDITION.fullmatch(condition)
    if found is None:
        raise InputError(f"{place}: expected NAME == VALUE (or !=, <, <=, >, >=), found {condition!r}")
    name, operator, text = found.groups()
    if name not in variables:
        raise InputError(f"{place}: expected a variable in {condition!r}, found {name!r}: {nearest(name, variables)}")
    left, right = variables[name], _toml_or_text(text)
    if operator in ("==", "!="):
        return bool(left == right) == (operator == "==")
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in (left, right)):
        raise InputError(f"{place}: expected numbers on both sides of {operator}, found {left!r} and {right!r}")
    return bool({"<": left < right, "<=": left <= right, ">": left > right, ">=": left >= right}[operator])


def fill(value: Any, variables: Mapping[str, Any], place: Place, key: str) -> Any:
    """Return a value of a section with the variables in their places. Raises InputError for unknown variables."""
    if isinstance(value, Mapping):
        return {name: fill(item, variables, place, key) for name, item in value.items()}
    if isinstance(value, list):
        return [fill(item, variables, place, key) for item in value]
    if not isinstance(value, str):
        return value
    require_known(_NAME.findall(value), variables, f"{place(key)}: {key}")
    if alone := _NAME.fullmatch(value):
        return variables[alone[1]]
    return _NAME.sub(lambda found: _as_text(variables[found[1]]), value)


def require_known(names: Sequence[str], variables: Collection[str], place: str) -> None:
    """Raise InputError for the first name that is no variable."""
    for name in names:
        if name not in variables:
            raise InputError(f"{place}: expected a variable in {{{name}}}, found none: {nearest(name, variables)}")


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def without_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values less empty texts and what they leave empty: an empty variable leaves its flag out."""
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            value = without_empty(value)
        if isinstance(value, list):
            value = [item for item in value if item != ""]
        if value not in ("", {}, []):
            kept[name] = value
    return kept
