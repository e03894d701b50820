"""`draftcache vocab`: build one draft-vocabulary map over several prepared datasets."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from draftcache.store.common.errors import InputError, ManifestMismatchError
from draftcache.tools.results import add_json, show

if TYPE_CHECKING:
    import numpy as np


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags: the prepared datasets, the size of the vocabulary and the file to write."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="PREPARED_DIR[:SPLIT]",
        help="a prepared dataset (its splits that are not held out), or one split of it",
    )
    parser.add_argument("--size", type=int, required=True, metavar="N", help="ids in the draft vocabulary")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the .safetensors map to write")
    parser.add_argument("--overwrite", action="store_true", help="replace another map at --output")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Build the map from the union of the inputs' token counts, write it and print what it covers. Returns 0.

    Raises InputError if another map exists at --output and --overwrite was not given.
    """
    from draftcache.capture.prepare.draft_vocabulary import build_vocab_map, coverage_table
    from draftcache.store.format.vocab_map import VocabMap
    from draftcache.tools.reports.accounting import coverage_text

    counts = read_counts(arguments.inputs)
    vocab_map = build_vocab_map(counts, arguments.size)
    output = arguments.output
    if output.exists() and not arguments.overwrite and VocabMap.load(output).hash != vocab_map.hash:
        raise InputError(
            f"--output {output}: expected a new path or the same map, found map {VocabMap.load(output).hash}; what was "
            "captured or trained on it needs it, so choose another path, or replace it with --overwrite"
        )
    vocab_map.save(output)
    coverage = [row.as_json() for row in coverage_table(counts, vocab_map)]
    table = coverage_text(coverage, len(vocab_map))
    values = {"output": str(output), "hash": vocab_map.hash, "size": len(vocab_map), "coverage": coverage}
    show(arguments, values, f"draft vocabulary {vocab_map.hash}\n\n{table}\n\n{output}: written")
    return 0


def read_counts(inputs: list[str]) -> dict[str, np.ndarray]:
    """Return the counts of loss-masked tokens, int64 [V], by `directory:split`.

    Raises ManifestMismatchError if the tokenizers differ, and InputError if a split is named twice.
    """
    from draftcache.capture.prepare.token_dataset import TokenDataset

    counts: dict[str, np.ndarray] = {}
    first: TokenDataset | None = None
    for text in inputs:
        path, split = _path_and_split(text)
        dataset = TokenDataset.open(path)
        first = first or dataset
        for field in ("tokenizer_hash", "vocab_size"):
            expected, found = getattr(first, field), getattr(dataset, field)
            if expected != found:
                raise ManifestMismatchError(
                    f"{path}: {field}: expected {expected}, as in {first.path}, found {found}; "
                    "one map needs one tokenizer"
                )
        names = [split] if split else [name for name in dataset.splits if name not in dataset.held_out]
        for name in names:
            key = f"{path.resolve().name}:{name}"
            if key in counts:
                raise InputError(f"{text}: expected every split once, found {key} twice: it would count double")
            counts[key] = dataset.split(name).token_counts
    return counts


def _path_and_split(text: str) -> tuple[Path, str]:
    if Path(text).exists():  # a directory's name may hold a colon
        return Path(text), ""
    path, _, split = text.rpartition(":")
    return (Path(path), split) if path else (Path(text), "")
