"""`draftcache run`: run a recipe, which holds the commands of a whole job as sections of one TOML file."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from draftcache.store.common.errors import InputError
from draftcache.tools.results import add_json, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `draftcache run`."""
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="a recipe's file, or the name of a shipped one")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a value for a variable of the recipe, or for a flag of a step as STEP.FLAG=VALUE (repeatable)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of the steps' outputs (default: runs/ and the recipe's name)"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, print the commands, sizes, hours and memory, and run nothing",
    )
    parser.add_argument("--list", action="store_true", help="name the shipped recipes")
    parser.add_argument("--show", action="store_true", help="print the recipe's file")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the steps that are not done yet.

    Returns 0, or 1 where rows were quarantined, or the exit code of the step that failed or was interrupted. Raises
    InputError, before anything runs, for a recipe that can't work.
    """
    from draftcache.tools.recipes.recipe import find_recipe, shipped_recipes

    if arguments.list:
        known = shipped_recipes()
        width = max(map(len, known))
        show(arguments, known, "\n".join(f"{name:<{width}}  {about}" for name, about in known.items()))
        return 0
    if arguments.recipe is None:
        raise InputError("expected a recipe's file, or a name that --list shows, found none")
    path = find_recipe(arguments.recipe)
    if arguments.show:
        text = path.read_text(encoding="utf-8")
        show(arguments, {"path": str(path), "text": text}, text.rstrip("\n"))
        return 0
    return _run(arguments, path)


def _run(arguments: argparse.Namespace, path: Path) -> int:
    from draftcache.tools.recipes.checks import check_steps
    from draftcache.tools.recipes.plan import format_plan, plan_of
    from draftcache.tools.recipes.recipe import load_recipe
    from draftcache.tools.recipes.runner import format_outcomes, run_process, run_steps
    from draftcache.tools.recipes.steps import steps_of
    from draftcache.tools.recipes.variables import parse_set

    folder = arguments.output or Path("runs") / path.stem
    recipe = load_recipe(path, parse_set(arguments.set), folder)
    checked = check_steps(steps_of(recipe, folder))
    if arguments.dry_run:
        plan = plan_of(recipe, checked, folder)
        show(arguments, plan, format_plan(plan))
        return 0
    outcomes = run_steps(checked, folder, partial(run_process, as_json=arguments.json))
    left = list(checked)[len(outcomes) :]
    code = outcomes[-1].exit_code
    if code not in (0, 1) or left:
        print(
            f"draftcache run: [{outcomes[-1].name}] ended with exit code {code}; the same command goes on from there",
            file=sys.stderr,
        )
        return code
    values = {"recipe": str(path), "output": str(folder), "steps": [one.to_json() for one in outcomes]}
    show(arguments, values, f"\n{folder}: {len(outcomes)} steps are done\n{format_outcomes(outcomes, left)}")
    return max(one.exit_code for one in outcomes)
