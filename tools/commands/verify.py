"""`draftcache verify`: check a store or a prepared dataset, and name what is damaged, down to the conversation."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags, which are the settings of `draftcache.store.verify.verify_store`."""
    parser.add_argument("store", help="directory, file://, s3:// or gs:// URL of a store; or a prepared dataset")
    parser.add_argument("--quick", action="store_true", help="only commit records and file sizes; reads no array")
    parser.add_argument("--allow-partial", action="store_true", help="accept a store whose capture has not finished")
    parser.add_argument("--workers", type=int, help="processes (default: one per CPU)")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Verify the store or dataset and print the report.

    Returns 1 if it is damaged, or a store whose capture has not finished without --allow-partial.
    """
    from draftcache.capture.prepare.token_dataset import is_prepared

    if is_prepared(Path(arguments.store)):
        return _verify_dataset(Path(arguments.store), as_json=arguments.json)
    return _verify_store(arguments)


def _verify_dataset(path: Path, *, as_json: bool) -> int:
    from draftcache.capture.prepare.token_dataset import TokenDataset, find_damages
    from draftcache.store.common.progress import progress_bar

    with progress_bar(unit="B", unit_scale=True, desc="verify", disable=as_json) as bar:
        damages = find_damages(path, lambda size: bar.update(size))
    if as_json:
        print(json.dumps({"location": str(path), "damages": [asdict(damage) for damage in damages]}, indent=2))
        return 1 if damages else 0
    for damage in damages:
        print(f"DAMAGED {damage.name}: {damage.problem}")
        for number in damage.conversations:
            print(f"  touches {damage.name.partition('/')[0]}[{number}]")
    if damages:
        print("Run the prepare command again with --overwrite.")
    else:
        dataset = TokenDataset.open(path)
        rows = sum(len(dataset.split(name)) for name in dataset.splits)
        print(f"{path}: a prepared dataset of {rows:,} conversations, all files as they were written")
    return 1 if damages else 0


def _verify_store(arguments: argparse.Namespace) -> int:
    from draftcache.store.common.progress import progress_bar
    from draftcache.store.verify import verify_store

    with progress_bar(unit="B", unit_scale=True, desc="verify", disable=arguments.json) as bar:
        report = verify_store(
            arguments.store, quick=arguments.quick, workers=arguments.workers, progress=lambda size: bar.update(size)
        )
    good = not report.damages and (report.finished or arguments.allow_partial)
    if arguments.json:
        print(json.dumps(report.to_json(), indent=2))
        return 0 if good else 1
    for damage in report.damages:
        print(f"DAMAGED {damage.name}: {damage.problem}")
        for item in damage.conversations:
            print(f"  touches {item['split']}[{item['dataset_index']}] {item['content_hash']}")
    for name in report.strays:
        print(f"stray   {name}: no commit record names it")
    print(
        f"{report.location}: {report.committed} of {report.shards} shards committed, {report.conversations:,} "
        f"conversations, {report.bytes / 1e9:.3f} GB, {len(report.damages)} damages in "
        f"{len(report.damaged_shards)} shards" + (" (quick: sizes and records only)" if report.quick else "")
    )
    if report.damages:
        print("Run `draftcache repair` to take the damaged shards out, then the capture command to make them again.")
    elif not report.finished:
        print("The capture has not finished: run its command again.")
    return 0 if good else 1
