"""`draftcache sweep`: train many drafts from one store, several of them on one reading of it."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftcache.store.common.errors import InputError
from draftcache.store.common.files import read_json, write_json
from draftcache.tools.results import add_json, show

if TYPE_CHECKING:
    from draftcache.tools.sweep.plan import Sweep

LAUNCHERS = ("local", "ray")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `draftcache sweep`."""
    parser.add_argument("sweep", type=Path, metavar="SWEEP.toml", help="sections [train], [axes] and perhaps [asha]")
    parser.add_argument("--output", type=Path, required=True, help="directory; the same command goes on from there")
    parser.add_argument("--launcher", choices=LAUNCHERS, default="local", help="where trials run (default: local)")
    parser.add_argument("--workers", type=int, default=0, help="groups of trials at once; 0: one per GPU or core")
    parser.add_argument(
        "--side-by-side", type=int, default=0, help="trials at once on a device; 0: as many as its memory holds"
    )
    parser.add_argument("--device", default="auto", help="cuda, cuda:N, cpu, or auto (default: auto)")
    parser.add_argument("--dry-run", action="store_true", help="print the trials and how they share readings; run none")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Train every trial that is not finished, and show the results. Returns 0, or 1 where trials failed."""
    from draftcache.tools.sweep.plan import PLAN_NAME, read_sweep

    for name in ("workers", "side_by_side"):
        if (value := getattr(arguments, name)) < 0:
            raise InputError(f"--{name.replace('_', '-')}: expected 0 or more, found {value}")
    sweep = read_sweep(arguments.sweep, arguments.output)
    if arguments.dry_run:
        show(arguments, sweep.to_json(), _format_plan(sweep))
        return 0
    plan = arguments.output / PLAN_NAME
    if plan.is_file():
        _require_same(plan, sweep)
    else:
        arguments.output.mkdir(parents=True, exist_ok=True)
        write_json(plan, sweep.to_json())
    _launch(sweep, arguments)
    return _report(sweep, arguments)


def _launch(sweep: Sweep, arguments: argparse.Namespace) -> None:
    if arguments.launcher == "ray":
        from draftcache.tools.sweep.ray_tune import run_on_ray

        run_on_ray(sweep, arguments.output, arguments.workers, arguments.side_by_side, arguments.device)
        return
    from draftcache.tools.sweep.launch import run_locally, slots_of

    slots = slots_of(len(sweep.groups), arguments.device, arguments.workers)
    run_locally(sweep, arguments.output, slots, arguments.side_by_side)


def _report(sweep: Sweep, arguments: argparse.Namespace) -> int:
    from draftcache.tools.sweep.picture import draw_sweep
    from draftcache.tools.sweep.results import collect, format_results, write_results

    results = collect(sweep, arguments.output)
    write_results(results, arguments.output)
    if find_spec("matplotlib") is None:
        print("draftcache sweep: no picture without matplotlib; install draftcache[plot]", file=sys.stderr)
    else:
        draw_sweep(sweep, results, arguments.output / "sweep.png")
    show(arguments, {"output": str(arguments.output), **results}, format_results(results))
    return int(any(str(row["state"]).startswith("failed") for row in results["trials"]))


def _require_same(plan: Path, sweep: Sweep) -> None:
    """Raise InputError where the directory holds another sweep. More values on an axis are another sweep too."""
    before: dict[str, Any] = read_json(plan)
    now = sweep.to_json()
    for name in ("axes", "asha"):
        if before[name] != now[name]:
            raise InputError(
                f"{plan}: expected the {name} of the sweep that was begun there, {before[name]!r}, found "
                f"{now[name]!r}; choose another --output"
            )
    for mine, theirs in zip(now["trials"], before["trials"], strict=True):
        for name, value in theirs["settings"].items():
            if mine["settings"].get(name) != value:
                raise InputError(
                    f"{plan}: expected {name} {value!r} in {theirs['name']}, as the sweep was begun, found "
                    f"{mine['settings'].get(name)!r}; choose another --output"
                )


def _format_plan(sweep: Sweep) -> str:
    lines = [
        f"{len(sweep.trials)} trials in {len(sweep.groups)} groups; a group trains side by side on one reading of its "
        "store"
    ]
    for number, group in enumerate(sweep.groups):
        lines.append(f"group {number}: store {sweep.trials[group[0]].config.store}")
        for at in group:
            axes = ", ".join(f"{name} {value}" for name, value in sweep.trials[at].axes.items())
            lines.append(f"  {sweep.trials[at].name}: {axes}")
    return "\n".join(lines)
