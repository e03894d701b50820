"""Reads a recipe: one TOML file that holds the commands of a whole job, with their flags.

```
about = "one line, for --list"

[needs]                              # variables that have to be given by --set, and what they are
data = "conversations: a file, a folder or a glob"

[set]                                # variables with their values; --set changes them
length = 32768
recompute = false

[when.'length > 32768']              # changes variables where a condition on one of them holds
recompute = true

[prepare]                            # one section per step, in order: COMMAND, or COMMAND-NAME
inputs = { train = "{data}" }
...

[train-stage1]
only_if = 'length > 0'               # leaves the step out where it does not hold
dataset = "@prepare"                 # the output of the step of this name, above
recompute_mlp = "{recompute}"
```
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftcache.store.common.errors import InputError
from draftcache.tools.cli import COMMANDS
from draftcache.tools.config_file import nearest, place_in, read_toml
from draftcache.tools.recipes.variables import fill, holds, merge, without_empty

SHIPPED = Path(__file__).parent / "shipped"
"""Folder of the recipes that come with draftcache."""
DEMO_ASSETS = Path(__file__).parents[1] / "demo" / "assets"

_SECTION = re.compile(r"[a-z]+(-[A-Za-z0-9_-]+)?")
_TOP = {"about": str, "needs": dict, "set": dict, "when": dict}
_BUILT_IN = ("here", "output", "demo_assets")
"""Variables of every recipe: the folders of the recipe's file, of its outputs, and of the demo's data."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe with its variables filled in."""

    path: Path
    about: str
    variables: dict[str, Any]
    sections: dict[str, dict[str, Any]]
    """Values by key, by section, in the order of the steps; those that `only_if` leaves out are not among them."""
    left_out: tuple[str, ...]
    """Steps that `only_if` leaves out."""


def shipped_recipes() -> dict[str, str]:
    """Return what each recipe that comes with draftcache is for, by name."""
    return {path.stem: str(read_toml(path).get("about", "")) for path in sorted(SHIPPED.glob("*.toml"))}


def find_recipe(text: str) -> Path:
    """Return the file that a path or the name of a shipped recipe names. Raises InputError where there is none."""
    path = Path(text)
    if path.is_file():
        return path
    shipped = SHIPPED / f"{text}.toml"
    if shipped.is_file():
        return shipped
    known = shipped_recipes()
    raise InputError(f"{text}: expected a recipe's file or the name of a shipped one: {nearest(text, known)}")


def load_recipe(path: Path, given: Mapping[str, Any], output: Path) -> Recipe:
    """Read a recipe. `given` holds the values of --set: variables, and flags of a step as STEP.FLAG.

    `output` is the folder of what the steps make.

    Raises InputError, with the file and the line, for what is no recipe.
    """
    body = read_toml(path)
    for name, kind in _TOP.items():
        if not isinstance(body.get(name, kind()), kind):
            raise InputError(f"{place_in(path)(name)}: expected {name} to be {_KINDS[kind]}, found {body[name]!r}")
    sections = {name: value for name, value in body.items() if name not in _TOP}
    _require_sections(path, sections)
    flags = {name: value for name, value in given.items() if "." in name}
    built_in = dict(zip(_BUILT_IN, map(str, (path.parent, output, DEMO_ASSETS)), strict=True))
    variables = _variables(path, body, built_in, {name: value for name, value in given.items() if "." not in name})
    for name, value in flags.items():
        section, _, key = name.partition(".")
        if section not in sections:
            raise InputError(
                f"--set {name}: expected a step of {path}, found {section!r}: {nearest(section, sections)}"
            )
        old = next((one for one in sections[section] if one.replace("-", "_") == key.replace("-", "_")), key)
        sections[section] = sections[section] | {old: value}
    kept, left_out = {}, []
    for name, section in sections.items():
        place = place_in(path, name)
        condition = section.get("only_if")
        if condition is not None and not holds(str(condition), variables, place("only_if")):
            left_out.append(name)
            continue
        values = {key: fill(value, variables, place, key) for key, value in section.items() if key != "only_if"}
        kept[name] = without_empty(values)
    if not kept:
        raise InputError(f"{path}: expected at least one step, such as [prepare], found none")
    return Recipe(
        path=path,
        about=str(body.get("about", "")),
        variables={name: value for name, value in variables.items() if name not in _BUILT_IN},
        sections=kept,
        left_out=tuple(left_out),
    )


_KINDS = {str: "text", dict: "a section"}


def _require_sections(path: Path, sections: Mapping[str, Any]) -> None:
    commands = [name for name in COMMANDS if name != "run"]
    for name, value in sections.items():
        if not isinstance(value, dict):
            raise InputError(
                f"{place_in(path)(name)}: expected {name} in a section, or one of {sorted(_TOP)}, found it at the top"
            )
        command = name.partition("-")[0]
        if not _SECTION.fullmatch(name) or command not in commands:
            known = [*commands, "needs", "set", "when"]
            raise InputError(
                f"{place_in(path, name)('')}: expected [COMMAND] or [COMMAND-NAME], found {command!r}: "
                f"{nearest(command, known)}"
            )


def _variables(
    path: Path, body: Mapping[str, Any], built_in: Mapping[str, str], given: Mapping[str, Any]
) -> dict[str, Any]:
    own = body.get("set", {})
    if taken := sorted(set(built_in) & {*own, *body.get("needs", {})}):
        raise InputError(f"{place_in(path, 'set')(taken[0])}: expected another name than {taken[0]}, which is built in")
    variables: dict[str, Any] = dict(built_in)
    for name, value in merge(own, given, body.get("needs", {})).items():
        variables[name] = value if name in given else fill(value, variables, place_in(path, "set"), name)
    changes: dict[str, Any] = {}
    for condition, values in body.get("when", {}).items():
        if not isinstance(values, dict):
            raise InputError(f"{path}: [when]: expected a section [when.'NAME > VALUE'], found {condition!r}")
        for name in values:
            if name not in own:
                raise InputError(
                    f"{path}: [when.{condition!r}]: expected a variable of [set], found {name!r}: {nearest(name, own)}"
                )
        if holds(condition, variables, f"{path}: [when.{condition!r}]"):
            changes |= {name: value for name, value in values.items() if name not in given}
    return variables | changes
