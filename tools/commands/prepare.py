"""`draftcache prepare`: turn conversations into token ids, loss masks, token counts and the draft vocabulary."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from draftcache.store.common.errors import InputError
from draftcache.tools.results import add_json, show

if TYPE_CHECKING:
    from draftcache.capture.prepare.job import PrepareConfig

# A split's name becomes the name of a directory beside manifest.json, and of a table row beside the row `union`.
_SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RESERVED = ("manifest.json", "vocab_map.safetensors", "tokenizer.json", "union")


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
        "--drop-duplicates",
        action="store_true",
        help="of conversations with equal ids and masks, as stored, keep the first one over all splits, held-out ones "
        "last: what a held-out split has in common with another split is dropped from the held-out split",
    )
    parser.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="Jinja template (default: the tokenizer's own); its text must equal the own one's on every row",
    )
    parser.add_argument(
        "--allow-template-difference",
        action="store_true",
        help="go on where --chat-template renders other text than the tokenizer's own template",
    )
    add_rendering(parser)
    parser.add_argument(
        "--turns",
        choices=("auto", "all", "each", "last"),
        default="auto",
        help="answers that carry loss: all in one row; each in a row of its own, as it was generated; the last alone; "
        "auto: each for rows whose earlier answers the template rewrites, all for others (%(default)s)",
    )
    parser.add_argument(
        "--loss-mask",
        choices=("prompt", "tags"),
        default="prompt",
        help="what tells the text of an answer: the generation prompt, or the template's generation tags (%(default)s)",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="set rows aside whose text the template drops, instead of counting them",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the tokenizer directory holds"
    )
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: one per core)")
    parser.add_argument(
        "--show",
        type=int,
        default=0,
        metavar="N",
        help="print N rows of each split with the loss marked before anything is written (%(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a finished dataset")
    add_json(parser)


def check(arguments: argparse.Namespace) -> None:
    """Raise InputError for settings that are out of range, before anything is read; inputs may not be there yet."""
    _config(arguments, named_splits(arguments.inputs), named_splits(arguments.held_out))


def add_rendering(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how messages are read and rendered."""
    parser.add_argument(
        "--template-arg",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a variable for the template, such as enable_thinking=false: JSON if it is that, else text (repeatable)",
    )
    parser.add_argument(
        "--date", default="2026-01-01", metavar="YYYY-MM-DD", help="what templates take for today's date (%(default)s)"
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message for rows that have none")
    parser.add_argument(
        "--role",
        action="append",
        default=[],
        metavar="NAME=ROLE",
        help="read the messages of NAME as those of ROLE: system, developer, user, assistant or tool (repeatable)",
    )


def run(arguments: argparse.Namespace) -> int:
    """Prepare the dataset and print its tables. Returns 1 if rows were quarantined, else 0."""
    from draftcache.capture.prepare.job import prepare
    from draftcache.capture.prepare.token_dataset import QUARANTINE
    from draftcache.tools.reports.dataset_text import format_dataset, leakage_warnings

    config = _config(arguments, read_splits(arguments.inputs), read_splits(arguments.held_out))
    if arguments.show:
        from draftcache.capture.prepare.preview import preview
        from draftcache.tools.reports.shown_conversation import show_samples

        show_samples(*preview(config, arguments.show), sys.stdout)
    result = prepare(config)
    state = "was already made by this job" if result.reused else "written"
    values = {
        "output": str(arguments.output),
        "reused": result.reused,
        "quarantined_rows": result.quarantined_rows,
        "dataset": result.manifest,
    }
    show(arguments, values, f"{format_dataset(result.manifest)}\n\n{arguments.output}: {state}")
    for warning in leakage_warnings(result.manifest):
        print(warning, file=sys.stderr)
    if result.quarantined_rows:
        print(
            f"{result.quarantined_rows:,} rows were quarantined: see {arguments.output}/*/{QUARANTINE}",
            file=sys.stderr,
        )
        return 1
    return 0


def _config(
    arguments: argparse.Namespace, splits: dict[str, list[Path]], held_out: dict[str, list[Path]]
) -> PrepareConfig:
    from draftcache.capture.prepare.chat.settings import ChatSettings, parse_template_args
    from draftcache.capture.prepare.job import PrepareConfig

    if arguments.show < 0:
        raise InputError(f"--show: expected a number of rows of at least 0, found {arguments.show}")
    return PrepareConfig(
        tokenizer=arguments.tokenizer,
        output=arguments.output,
        splits=splits,
        held_out=held_out,
        max_length=arguments.max_length,
        draft_vocab_size=arguments.draft_vocab_size,
        drop_duplicates=arguments.drop_duplicates,
        chat_template=arguments.chat_template,
        allow_template_difference=arguments.allow_template_difference,
        chat=ChatSettings(
            turns=arguments.turns,
            template_args=parse_template_args(arguments.template_arg),
            date=arguments.date,
            system=arguments.system,
            loss_mask=arguments.loss_mask,
            strict=arguments.strict,
        ),
        trust_remote_code=arguments.trust_remote_code,
        roles=tuple(arguments.role),
        workers=arguments.workers,
        overwrite=arguments.overwrite,
    )


def read_splits(pairs: list[str]) -> dict[str, list[Path]]:
    """Parse NAME=INPUT pairs into {name: files}, in order.

    Raises InputError for any other text, a reserved name, and an input that names no files.
    """
    from draftcache.capture.prepare.rows.sources import expand_input

    splits: dict[str, list[Path]] = {}
    for name, text in _pairs(pairs):
        splits.setdefault(name, []).extend(expand_input(text))
    return splits


def named_splits(pairs: list[str]) -> dict[str, list[Path]]:
    """Parse NAME=INPUT pairs as they stand, whether or not their inputs are there."""
    splits: dict[str, list[Path]] = {}
    for name, text in _pairs(pairs):
        splits.setdefault(name, []).append(Path(text))
    return splits


def _pairs(pairs: list[str]) -> Iterator[tuple[str, str]]:
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not text or not _SPLIT_NAME.fullmatch(name) or name in _RESERVED:
            raise InputError(
                f"{pair!r}: expected NAME=INPUT, NAME of letters, digits, '.', '_' and '-' "
                f"and none of {', '.join(_RESERVED)}"
            )
        yield name, text
