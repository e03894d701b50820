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
    parser.add_argument(
        "--bigram-splits",
        help="also measure a table of each token's most frequent successor in these splits, comma-separated (default "
        "with --bigram-store: the splits that the checkpoint was trained on)",
    )
    parser.add_argument("--bigram-store", help="store of --bigram-splits (default: --store)")
    parser.add_argument(
        "--compute",
        default="auto",
        help="fused (the kernels of training, in bfloat16), plain (float32), or auto (fused on a GPU where it can run)",
    )
    parser.add_argument("--device", default="auto", help="cuda, cuda:N, cpu, or auto")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate and print a table: per split the draft, the untrained draft and, if asked for, a bigram. Returns 0."""
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
        compute=arguments.compute,
        progress=True,
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
        bigram = f"{row['bigram']['acceptance_length']:.3f}" if "bigram" in row else "-"
        steps = " ".join(f"{value:.2f}" for value in row["draft"]["conditional_acceptance"])
        lines.append(
            f"{split:<20} {row['draft']['acceptance_length']:>8.3f} {row['untrained']['acceptance_length']:>10.3f} "
            f"{bigram:>8}  {row['draft']['kind']}: {steps}"
        )
    return "\n".join(lines)
