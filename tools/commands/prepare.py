"""`draftcache prepare`: turn conversations into token ids, loss masks, token counts and the draft vocabulary."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from draftcache.store.common.errors import InputError
from draftcache.tools.results import add_json, show

# A split's name becomes the name of a directory beside manifest.json, and of a table row beside the row `union`.
_SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RESERVED = ("manifest.json", "vocab_map.safetensors", "union")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags, which are the settings of `draftcache.capture.prepare.job.PrepareConfig`."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="NAME=INPUT",
        help="conversations of one split: a file, a folder, a glob, a folder of datasets.save_to_disk, or "
        "ORG/NAME[:SPLIT] of the Hugging Face hub; a repeated NAME is one split of several inputs; these splits are "
        "counted into the draft vocabulary",
    )
    parser.add_argument("--tokenizer", type=Path, required=True, metavar="DIR", help="the verifier's tokenizer")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the dataset to write")
    parser.add_argument(
        "--held-out",
        action="append",
        default=[],
        metavar="NAME=INPUT",
        help="a split that is prepared but not counted into the draft vocabulary (repeatable)",
    )
    parser.add_argument(
        "--max-length", type=int, default=32768, metavar="N", help="tokens kept of each conversation (%(default)s)"
    )
    parser.add_argument(
        "--draft-vocab-size", type=int, metavar="N", help="build a draft-vocabulary map of N ids (default: none)"
    )
    parser.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="Jinja template with generation tags (default: the tokenizer's own); its text must equal the own one's",
    )
    parser.add_argument(
        "--allow-template-difference",
        action="store_true",
        help="go on where --chat-template renders other text than the tokenizer's own template",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the tokenizer directory holds"
    )
    parser.add_argument(
        "--role",
        action="append",
        default=[],
        metavar="NAME=ROLE",
        help="read the messages of NAME as those of ROLE: system, developer, user, assistant or tool (repeatable)",
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished dataset")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Prepare the dataset and print its tables. Returns 1 if rows were quarantined, else 0."""
    from draftcache.capture.prepare.job import PrepareConfig, prepare
    from draftcache.capture.prepare.token_dataset import QUARANTINE

    result = prepare(
        PrepareConfig(
            tokenizer=arguments.tokenizer,
            output=arguments.output,
            splits=read_splits(arguments.inputs),
            held_out=read_splits(arguments.held_out),
            max_length=arguments.max_length,
            draft_vocab_size=arguments.draft_vocab_size,
            chat_template=arguments.chat_template,
            allow_template_difference=arguments.allow_template_difference,
            trust_remote_code=arguments.trust_remote_code,
            roles=tuple(arguments.role),
            workers=arguments.workers,
            overwrite=arguments.overwrite,
        )
    )
    state = "was already made by this job" if result.reused else "written"
    values = {
        "output": str(arguments.output),
        "reused": result.reused,
        "quarantined_rows": result.quarantined_rows,
        "dataset": result.manifest,
    }
    show(arguments, values, f"{format_dataset(result.manifest)}\n\n{arguments.output}: {state}")
    if result.quarantined_rows:
        print(
            f"{result.quarantined_rows:,} rows were quarantined: see {arguments.output}/*/{QUARANTINE}",
            file=sys.stderr,
        )
        return 1
    return 0


def read_splits(pairs: list[str]) -> dict[str, list[Path]]:
    """Parse NAME=INPUT pairs into {name: files}, in order.

    Raises InputError for any other text, a reserved name, and an input that names no files.
    """
    from draftcache.capture.prepare.rows.sources import expand_input

    splits: dict[str, list[Path]] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not text or not _SPLIT_NAME.fullmatch(name) or name in _RESERVED:
            raise InputError(
                f"{pair!r}: expected NAME=INPUT, NAME of letters, digits, '.', '_' and '-' "
                f"and none of {', '.join(_RESERVED)}"
            )
        splits.setdefault(name, []).extend(expand_input(text))
    return splits


def format_dataset(details: dict[str, Any]) -> str:
    """Format the manifest of a prepared dataset: its tables, and why rows were quarantined."""
    from draftcache.tools.reports.accounting import accounting_table, coverage_text

    lines = [
        f"vocabulary: {details['vocab_size']:,} ids, from {details['vocab_size_from']}",
        f"chat template: {details['chat_template']['source']}, {details['chat_template']['matched']}",
        "",
        accounting_table(details),
    ]
    for name, record in details["splits"].items():
        lines += [f"{name}: {rows:,} x {reason}" for reason, rows in record["quarantined_by_reason"].items()]
    vocabulary = details["draft_vocabulary"]
    if vocabulary is not None:
        coverage = coverage_text(vocabulary["coverage"], vocabulary["size"])
        lines += ["", f"draft vocabulary {vocabulary['hash']}", "", coverage]
    return "\n".join(lines)
