"""`draftcache verify`: check a store or a prepared dataset, and name what is damaged, down to the conversation."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from draftcache.tools.arguments import finite_number
from draftcache.tools.results import add_json, show

if TYPE_CHECKING:
    from draftcache.capture.prepare.token_dataset import DatasetDamage
    from draftcache.store.verify_report import VerifyReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags, which are the settings of `draftcache.store.verify.verify_store`."""
    parser.add_argument("store", help="directory, file://, s3:// or gs:// URL of a store; or a prepared dataset")
    parser.add_argument("--quick", action="store_true", help="only commit records and file sizes; reads no array")
    parser.add_argument("--allow-partial", action="store_true", help="accept a store whose capture has not finished")
    parser.add_argument("--shards", metavar="A-B", help="only the shards A to B, or the one shard A (default: all)")
    parser.add_argument(
        "--sample",
        type=finite_number,
        metavar="SHARE",
        help="read this share of the shards in full (0.1: a tenth), and check the others as --quick does",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="with --sample: which shards are read in full (default: 0); 0 to 9 with a tenth read every shard once",
    )
    parser.add_argument(
        "--journal",
        type=Path,
        metavar="FILE",
        help="note each checked shard in FILE: after a kill, the same command goes on from there; removed at the end",
    )
    parser.add_argument("--workers", type=int, help="processes (default: one per CPU)")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Verify the store or dataset and print the report.

    Returns 1 if it is damaged, or a store whose capture has not finished without --allow-partial. Raises InputError for
    flags that do not fit.
    """
    from draftcache.capture.prepare.token_dataset import is_prepared
    from draftcache.store.common.errors import InputError
    from draftcache.store.common.stopping import sigterm_stops

    with sigterm_stops():
        if not is_prepared(Path(arguments.store)):
            return _verify_store(arguments)
        for name in ("shards", "sample", "seed", "journal"):
            if getattr(arguments, name):
                raise InputError(
                    f"--{name}: expected a store, found the prepared dataset {arguments.store}, which is checked whole"
                )
        return _verify_dataset(arguments)


def _verify_dataset(arguments: argparse.Namespace) -> int:
    from draftcache.capture.prepare.token_dataset import TokenDataset, find_damages
    from draftcache.store.common.progress import progress_bar, set_total

    path = Path(arguments.store)
    with progress_bar(unit="B", unit_scale=True, desc="verify") as bar:
        damages = find_damages(path, lambda size: bar.update(size), lambda total: set_total(bar, total))
    rows = None
    if not damages:
        dataset = TokenDataset.open(path)
        rows = sum(len(dataset.split(name)) for name in dataset.splits)
    values = {"location": str(path), "conversations": rows, "damages": [asdict(damage) for damage in damages]}
    show(arguments, values, format_dataset_damages(path, damages, rows))
    return 1 if damages else 0


def format_dataset_damages(path: Path, damages: list[DatasetDamage], rows: int | None) -> str:
    """Format what is damaged in a prepared dataset; of a good one, of how many conversations, `rows`, it is."""
    if not damages:
        return f"{path}: a prepared dataset of {rows:,} conversations, all files as they were written"
    lines = []
    for damage in damages:
        lines.append(f"DAMAGED {damage.name}: {damage.problem}")
        lines += [f"  touches {damage.name.partition('/')[0]}[{number}]" for number in damage.conversations]
    return "\n".join([*lines, "Run the prepare command again with --overwrite."])


def _verify_store(arguments: argparse.Namespace) -> int:
    from draftcache.store.common.progress import progress_bar, set_total
    from draftcache.store.verify import verify_store

    with progress_bar(unit="B", unit_scale=True, desc="verify") as bar:
        report = verify_store(
            arguments.store,
            quick=arguments.quick,
            shards=None if arguments.shards is None else parse_shards(arguments.shards),
            sample=arguments.sample,
            seed=arguments.seed,
            journal=arguments.journal,
            workers=arguments.workers,
            planned=lambda total, done: set_total(bar, total, done),
            progress=lambda size: bar.update(size),
        )
    good = not report.damages and (report.finished or arguments.allow_partial)
    show(arguments, report.to_json(), format_report(report))
    return 0 if good else 1


def parse_shards(text: str) -> tuple[int, int]:
    """Parse `A-B` or `A` into the first and the last number of shards. Raises InputError for any other text."""
    from draftcache.store.common.errors import InputError

    first, dash, last = (part.strip() for part in text.partition("-"))
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise InputError(f"--shards: expected A-B or A, numbers of shards, found {text!r}")
    return int(first), int(last if dash else first)


def format_report(report: VerifyReport) -> str:
    """Format a report: the damages, then what was checked and what was not."""
    from draftcache.store.shard_choice import SAMPLE_RULE

    lines = []
    for damage in report.damages:
        lines.append(f"DAMAGED {damage.name}: {damage.problem}")
        for item in damage.conversations:
            lines.append(f"  touches {item['split']}[{item['dataset_index']}] {item['content_hash']}")
    lines += [f"stray   {name}: no commit record names it" for name in report.strays]
    lines += [
        f"{report.location}: {report.committed} of {report.shards} shards committed, {len(report.damages)} damages in "
        f"{len(report.damaged_shards)} shards",
        f"checked: {report.read_in_full} shards read in full, {report.checked_by_size} by record and file sizes only, "
        f"{report.not_looked_at} not looked at; {report.conversations:,} conversations, {report.bytes / 1e9:.3f} GB",
    ]
    if report.unreadable:
        lines.append(f"not checked: the files of {report.unreadable} shards, as their commit records can't be read")
    if report.from_journal:
        lines.append(f"{report.from_journal} of them were checked by an earlier run, and found good, by the journal")
    if report.choice.sample is not None:
        seed = report.choice.seed
        lines.append(f"sample: --seed {seed}; {SAMPLE_RULE}. --seed {seed + 1} reads others")
    if not report.complete:
        lines.append("Nothing is known of the content of shards that were not read in full.")
    if report.damages:
        lines.append(
            "Run `draftcache repair` to take the damaged shards out, then the capture command to make them again."
        )
    elif not report.finished:
        lines.append("The capture has not finished: run its command again.")
    return "\n".join(lines)
