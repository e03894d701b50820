"""`draftcache report`: one HTML page on training runs, sweeps, evaluations and stores."""

from __future__ import annotations

import argparse
from pathlib import Path

from draftcache.tools.results import add_json, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say what the page is about."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="training runs, a sweep, stores, and --output files of `draftcache eval` (those named eval*.json in a "
        "run's directory are found)",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="HTML file to write")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="tokenizer, to show conversations as text (default: as token ids)"
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the page and print its path. Returns 0."""
    from draftcache.store.common.files import atomic_path
    from draftcache.tools.reports.page.render import report_page

    page = report_page(arguments.inputs, arguments.tokenizer)
    with atomic_path(arguments.output) as partial:
        partial.write_text(page, encoding="utf-8", errors="replace")
    size = arguments.output.stat().st_size
    show(arguments, {"report": str(arguments.output), "bytes": size}, f"{arguments.output}: {size:,} bytes")
    return 0
