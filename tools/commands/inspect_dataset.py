"""`draftcache inspect` of a prepared dataset: its tables, or one of its conversations with the loss marked."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftcache.capture.prepare.token_dataset import TokenDataset
from draftcache.store.common.errors import InputError
from draftcache.tools.results import show

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from draftcache.capture.prepare.token_dataset import PreparedRow


def run_dataset(arguments: argparse.Namespace, rows: tuple[int, int] | None) -> int:
    """Print the tables of the dataset at `arguments.store`, or the chosen conversation. Returns 0.

    `rows`: what --rows says, or None. Raises InputError for flags that do not go together or are a store's.
    """
    path = Path(arguments.store)
    for flag, value in (("--index", arguments.index is not None), ("--allow-partial", arguments.allow_partial)):
        if value:
            raise InputError(
                f"{flag}: expected a store, found the prepared dataset {path}; its conversations are chosen with "
                "--conversation N and --split NAME"
            )
    if arguments.conversation is None:
        for name in ("split", "rows", "tokenizer"):
            if getattr(arguments, name) is not None:
                raise InputError(f"--{name}: expected --conversation N beside it, found none")
        return _show_tables(arguments, TokenDataset.open(path))
    result = _conversation(arguments, TokenDataset.open(path), rows)
    show(arguments, result, _format(result))
    return 0


def _show_tables(arguments: argparse.Namespace, dataset: TokenDataset) -> int:
    from draftcache.tools.reports.dataset_text import format_dataset, leakage_warnings

    show(
        arguments,
        {"path": str(dataset.path), "dataset": dataset.manifest},
        f"dataset {dataset.path}\n{format_dataset(dataset.manifest)}",
    )
    for warning in leakage_warnings(dataset.manifest):
        print(warning, file=sys.stderr)
    return 0


def _conversation(arguments: argparse.Namespace, dataset: TokenDataset, rows: tuple[int, int] | None) -> dict[str, Any]:
    from draftcache.tools.reports.shown_conversation import describe_shown, token_table

    tokenizer = _tokenizer(dataset, arguments.tokenizer)
    if tokenizer is None and rows is None:
        raise InputError(
            f"{dataset.path}: expected a tokenizer.json, to show text, found none: an earlier draftcache wrote this "
            "dataset. Give --tokenizer DIR, or --rows A,B to see the token ids alone"
        )
    shown = _shown(dataset, arguments.split or dataset.splits[0], arguments.conversation)
    result = describe_shown(shown, arguments.conversation, tokenizer if rows is None else None)
    table = None if rows is None else token_table(shown, *rows, tokenizer)
    return {"path": str(dataset.path), **result, "table": table}


def _format(result: dict[str, Any]) -> str:
    from draftcache.tools.reports.shown_conversation import format_described
    from draftcache.tools.reports.terminal_text import shows_colour

    return format_described(result, colour=shows_colour(sys.stdout))


def _shown(dataset: TokenDataset, name: str, number: int) -> PreparedRow:
    from draftcache.capture.prepare.token_dataset import PreparedRow

    split = dataset.split(name)
    if not 0 <= number < len(split):
        raise InputError(f"{dataset.path}: expected a conversation of {name} in 0 .. {len(split) - 1}, found {number}")
    token_ids, loss_mask, _ = split[number]
    record, sources = split.conversations[number], dataset.manifest["splits"][name]["sources"]
    return PreparedRow(
        split=name,
        file=sources[int(record["source_file"])]["file"],
        line=int(record["source_line"]),
        token_ids=token_ids,
        loss_mask=loss_mask,
        untruncated_tokens=int(record["untruncated_tokens"]),
    )


def _tokenizer(dataset: TokenDataset, directory: Path | None) -> Tokenizer | None:
    """The tokenizer that made the ids: that of --tokenizer, else the dataset's own, else None.

    Raises InputError where --tokenizer names another one.
    """
    from draftcache.store.common.files import hash_file
    from draftcache.tools.reports.shown_conversation import load_backend

    if directory is None:
        return load_backend(dataset.path) if dataset.has_tokenizer else None
    tokenizer = load_backend(directory)
    expected = dataset.manifest["tokenizer"].get("files", {}).get("tokenizer.json")
    found = hash_file(directory / "tokenizer.json")
    if expected not in (None, found):
        raise InputError(
            f"--tokenizer {directory}: expected the tokenizer of the dataset, whose tokenizer.json has the hash "
            f"{expected}, found {found}; its text would be another one"
        )
    return tokenizer
