"""`draftcache demo`: the whole pipeline on a tiny verifier and real text."""

from __future__ import annotations

import argparse
from pathlib import Path

from draftcache.tools.results import add_json, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's flags."""
    parser.add_argument(
        "--output", type=Path, help="directory of the run (default: runs/demo, runs/demo-DRAFT for another draft)"
    )
    parser.add_argument(
        "--draft", choices=("eagle3", "dflash", "dspark"), default="eagle3", help="architecture (default: eagle3)"
    )
    parser.add_argument(
        "--part",
        choices=("all", "data"),
        default="all",
        help="all, or data: write the conversations and the verifier's answers alone, into --output (default: all)",
    )
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo and print its table.

    Returns 1 if speculative decoding was not lossless, or if the offline and online counts of verify steps differ.
    """
    from draftcache.tools.demo.pipeline import Demo, DemoSize
    from draftcache.tools.demo.report import format_summary

    own = "demo" if arguments.draft == "eagle3" else f"demo-{arguments.draft}"
    output = arguments.output or Path("runs") / own
    demo = Demo(output, DemoSize(), arguments.draft)
    if arguments.part == "data":
        demo.write_data()
        files = sorted(path.name for path in output.glob("*.jsonl"))
        show(arguments, {"output": str(output), "files": files}, f"{output}: {', '.join(files)}")
        return 0
    summary = demo.run()
    made = "report.html, summary.json, curves.png, draft/ (for vLLM)"
    where = f"{output}: {made}; {summary['seconds']['total']:.0f} s"
    show(arguments, {"output": str(output), **summary}, f"\n{format_summary(summary)}\n\n{where}")
    return 0 if summary["speculative_decode_lossless"] and summary["offline_equals_online"] else 1
