"""`draftcache repair`: take damaged shards out of a store, so that the capture command makes only these again."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from draftcache.tools.results import add_json, show

if TYPE_CHECKING:
    from draftcache.store.repair import Repair
    from draftcache.store.verify_report import VerifyReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags: which store, and how thoroughly it is searched for damage."""
    parser.add_argument("store", help="directory, file://, s3:// or gs:// URL of a store")
    parser.add_argument("--quick", action="store_true", help="look for missing and cut files only")
    parser.add_argument("--workers", type=int, help="processes for the search (default: one per CPU)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Search for damage, move damaged shards aside and print what was done.

    Returns 0 if nothing was damaged or the store is whole again, and 1 if capture has shards to make again.
    """
    from draftcache.store.common.progress import progress_bar, set_total
    from draftcache.store.repair import Repair, repair_store
    from draftcache.store.verify import verify_store

    with progress_bar(unit="B", unit_scale=True, desc="verify") as bar:
        report = verify_store(
            arguments.store,
            quick=arguments.quick,
            workers=arguments.workers,
            planned=lambda total, done: set_total(bar, total, done),
            progress=lambda size: bar.update(size),
        )
    nothing = Repair(shards=[], files=[], directory="", index_rebuilt=False)
    repair = repair_store(arguments.store, report) if report.damages else nothing
    damages = [asdict(damage) for damage in report.damages]
    values = {"location": report.location, "damages": damages, **asdict(repair)}
    show(arguments, values, format_repair(report, repair))
    return 1 if repair.directory else 0


def format_repair(report: VerifyReport, repair: Repair) -> str:
    """Format what was damaged, and what was done about it."""
    if not report.damages:
        return f"{report.location}: nothing is damaged, nothing was changed"
    lines = [f"damaged {damage.name}: {damage.problem}" for damage in report.damages]
    if repair.directory:
        lines.append(
            f"{report.location}: shards {repair.shards} and files {repair.files} now lie in {repair.directory}; "
            "run the same capture command to make them again"
        )
    if repair.index_rebuilt:
        lines.append(f"{report.location}: index.npy was made again from the shards")
    return "\n".join(lines)
