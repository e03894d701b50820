"""`draftcache generate`: have the verifier answer prompts, for a draft that learns what the verifier itself writes."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from draftcache.capture.generate.config import GenerateConfig
from draftcache.tools.arguments import add_settings
from draftcache.tools.commands.prepare import add_rendering, named_splits, read_splits
from draftcache.tools.results import add_json, show

_NO_FLAGS = ("splits", "rendering", "roles", "progress")
_FLAGS = tuple(item.name for item in fields(GenerateConfig) if item.name not in _NO_FLAGS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the settings of GenerateConfig; how messages are read and rendered is prepare's."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="NAME=INPUT",
        help="prompts of one split, in any form that prepare reads, or without answers; a repeated NAME is one split "
        "of several inputs",
    )
    add_settings(parser, GenerateConfig, only=_FLAGS)
    add_rendering(parser)
    add_json(parser)


def check(arguments: argparse.Namespace) -> None:
    """Raise InputError for settings that are out of range, before anything is read; inputs may not be there yet."""
    _config(arguments, named_splits(arguments.inputs))


def run(arguments: argparse.Namespace) -> int:
    """Generate and print a summary. Returns 1 if anything was quarantined, else 0."""
    from draftcache.capture.generate.job import generate
    from draftcache.capture.generate.traces import QUARANTINE

    result = generate(_config(arguments, read_splits(arguments.inputs)))
    values = {
        "output": str(arguments.output),
        "reused": result.reused,
        "answered": result.answered,
        "retried": result.retried,
        "quarantined": result.quarantined,
        "traces": result.manifest,
    }
    show(arguments, values, format_summary(values))
    if result.quarantined:
        print(
            f"{result.quarantined:,} rows were quarantined: see {arguments.output}/{QUARANTINE}/*.jsonl",
            file=sys.stderr,
        )
        return 1
    return 0


def _config(arguments: argparse.Namespace, splits: dict[str, list[Path]]) -> GenerateConfig:
    from draftcache.capture.prepare.chat.settings import ChatSettings, parse_template_args

    return GenerateConfig(
        **{name: getattr(arguments, name) for name in _FLAGS},
        splits=splits,
        rendering=ChatSettings(
            template_args=parse_template_args(arguments.template_arg), date=arguments.date, system=arguments.system
        ),
        roles=tuple(arguments.role),
    )


def format_summary(values: dict[str, Any]) -> str:
    """Format what a job has made, one line per split, and where it lies."""
    lines = [
        f"{name}: {split['rows']:,} rows, {split['answer_tokens']:,} tokens of answers in {split['tokens']:,}, "
        f"{split['truncated']:,} cut off, {split['equal_to_earlier']:,} equal to earlier ones, "
        f"{split['retokenised']:,} retokenised, {split['quarantined']:,} quarantined"
        + "".join(f"\n  {reason}: {count:,}" for reason, count in split["quarantined_by_reason"].items())
        for name, split in values["traces"]["splits"].items()
    ]
    if values["reused"]:
        end = f"{values['output']}: was already made by this job"
    else:
        end = f"{values['output']}: written; {values['answered']:,} answers now, {values['retried']:,} retries"
    return "\n".join([*lines, end])
