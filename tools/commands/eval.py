"""`draftcache eval`: the offline acceptance length of a draft, measured on a store, beside two baselines."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from draftcache.tools.results import add_json, show


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the evaluation's flags."""
    parser.add_argument("--store", required=True, help="store to evaluate on")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="checkpoint, or a training --output (its newest)"
    )
    parser.add_argument("--splits", required=True, help="splits to evaluate, comma-separated")
    parser.add_argument("--draft-tokens", type=int, default=5, help="tokens proposed per verify step (default: 5)")
    parser.add_argument("--bigram-store", help="store that the bigram baseline counts (default: --store)")
    parser.add_argument(
        "--bigram-splits",
        help="its splits, comma-separated (default: the splits that the checkpoint was trained on)",
    )
    parser.add_argument("--device", default="auto", help="cuda, cuda:N, cpu, or auto")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and print a table: per split, the draft, the untrained draft and the bigram baseline. Returns 0."""
    from draftcache.draft_train.evaluate import evaluate
    from draftcache.store.common.files import write_json

    result = evaluate(
        store=arguments.store,
        checkpoint=arguments.checkpoint,
        splits=arguments.splits.split(","),
        draft_tokens=arguments.draft_tokens,
        bigram_store=arguments.bigram_store,
        bigram_splits=arguments.bigram_splits.split(",") if arguments.bigram_splits else None,
        device=arguments.device,
    )
    if arguments.output is not None:
        write_json(arguments.output, result)
    show(arguments, result, format_table(result))
    return 0


def format_table(result: dict[str, Any]) -> str:
    """Format the figures of `evaluate`: acceptance lengths per split, then the draft's conditional acceptance."""
    lines = [
        f"{'split':<20} {'draft':>8} {'untrained':>10} {'bigram':>8}  kind, conditional acceptance per draft token"
    ]
    for split, row in result["splits"].items():
        steps = " ".join(f"{value:.2f}" for value in row["draft"]["conditional_acceptance"])
        lines.append(
            f"{split:<20} {row['draft']['acceptance_length']:>8.3f} {row['untrained']['acceptance_length']:>10.3f} "
            f"{row['bigram']['acceptance_length']:>8.3f}  {row['draft']['kind']}: {steps}"
        )
    return "\n".join(lines)
