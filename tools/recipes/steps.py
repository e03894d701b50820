"""The steps of a recipe: one command each, with its outputs and what it takes from steps above."""

from __future__ import annotations

import importlib
import re
import sys
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftcache.store.common.errors import InputError
from draftcache.tools.cli import COMMANDS
from draftcache.tools.config_file import Place, actions_of, command_parser, name_of, nearest, place_in, words_of
from draftcache.tools.recipes.recipe import Recipe

AUTO = "auto"
_REFERENCE = re.compile(r"@([A-Za-z0-9_-]+)(?=$|[:/])")
_ENDINGS = {"vocab": ".safetensors", "eval": ".json", "report": ".html"}
"""Endings of outputs that are files; the others are directories."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of a recipe."""

    name: str
    command: str
    values: dict[str, Any]
    """Values by flag in snake case, with paths in the places of references. "auto" stands for what `auto` decides."""
    uses: tuple[str, ...]
    """The steps above whose outputs it reads."""
    output: str
    processes: int
    """Processes that train together, under torchrun."""
    place: Place

    @property
    def parser(self) -> ArgumentParser:
        """The command's parser, which raises InputError."""
        return parser_of(self.command)

    def words(self, changes: Mapping[str, Any]) -> list[str]:
        """Return the command's words, its name first, with `changes` instead of its own values of these flags."""
        values = {**self.values, **changes}
        return [self.command, *words_of(_actions(self.command), values, self.place, f"draftcache {self.command}")]

    def parse(self, changes: Mapping[str, Any]) -> Namespace:
        """Return the parsed words. Raises InputError, with the place, where the command's parser refuses them."""
        words = self.words(changes)[1:]
        try:
            return self.parser.parse_args(words)
        except InputError as exc:
            raise InputError(f"{self.place('')}: {exc}") from exc

    def launched(self, words: list[str]) -> list[str]:
        """Return the program and arguments that run these words in a process of its own, or under torchrun."""
        if self.processes == 1:
            return [sys.executable, "-m", "draftcache.tools.cli", *words]
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*launcher, "--nproc-per-node", str(self.processes), "-m", "draftcache.tools.cli", *words]

    def as_typed(self, words: list[str]) -> list[str]:
        """Return the words as a user would type them."""
        if self.processes == 1:
            return ["draftcache", *words]
        return ["torchrun", "--nproc-per-node", str(self.processes), "$(which draftcache)", *words]


def parser_of(command: str) -> ArgumentParser:
    """Return a command's parser, which raises InputError."""
    return command_parser(importlib.import_module(COMMANDS[command][0]).add_arguments, command)


def _actions(command: str) -> dict[str, Action]:
    return actions_of(parser_of(command))


def steps_of(recipe: Recipe, output: Path) -> list[Step]:
    """Return the steps in the order of the file. `output` is the folder of what they make.

    Raises InputError for unknown flags, for references to steps that are not above, and for two steps of one output.
    """
    steps: dict[str, Step] = {}
    for name, section in recipe.sections.items():
        step = _step(recipe, name, section, steps, output)
        if same := next((one.name for one in steps.values() if one.output == step.output), None):
            raise InputError(f"{step.place('output')}: expected an output of its own, found that of [{same}]")
        steps[name] = step
    return list(steps.values())


def _step(recipe: Recipe, name: str, section: Mapping[str, Any], above: Mapping[str, Step], output: Path) -> Step:
    command = name.partition("-")[0]
    place = place_in(recipe.path, name)
    values = dict(section)
    processes = values.pop("processes", 1) if command == "train" else 1
    if isinstance(processes, bool) or not isinstance(processes, int) or processes < 1:
        raise InputError(f"{place('processes')}: processes: expected a whole number of at least 1, found {processes!r}")
    uses: dict[str, None] = {}

    def resolve(value: Any, key: str) -> Any:
        if isinstance(value, Mapping):
            return {one: resolve(item, key) for one, item in value.items()}
        if isinstance(value, list):
            return [resolve(item, key) for item in value]
        found = _REFERENCE.match(value) if isinstance(value, str) else None
        if found is None:
            return value
        if found[1] not in above:
            raise InputError(f"{place(key)}: {key}: {_unknown_step(found[1], name, recipe, above)}")
        uses[found[1]] = None
        return above[found[1]].output + value[found.end() :]

    values = {name_of(key): resolve(value, key) for key, value in values.items()}
    actions = _actions(command)
    if "output" not in actions:
        raise InputError(f"{place('')}: expected a command that writes an --output, found {command!r}")
    values.setdefault("output", str(output / (name + _ENDINGS.get(command, ""))))
    if not isinstance(values["output"], str):
        raise InputError(f"{place('output')}: output: expected a path in quotes, found {values['output']!r}")
    return Step(
        name=name,
        command=command,
        values=values,
        uses=tuple(uses),
        output=values["output"],
        processes=processes,
        place=place,
    )


def _unknown_step(wanted: str, name: str, recipe: Recipe, above: Mapping[str, Step]) -> str:
    if wanted in recipe.left_out:
        return f"expected a step that runs in @{wanted}, found one that its only_if leaves out"
    if wanted in recipe.sections:
        return f"expected a step above [{name}] in @{wanted}, found one below it, or itself"
    return f"expected a step above [{name}] in @{wanted}, found none: {nearest(wanted, above)}"
