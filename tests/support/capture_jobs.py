"""Small capture jobs: rows of token ids, the prepared dataset of them, and settings over a tiny verifier."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.prepare.job import PrepareConfig, prepare

LAYERS = (0, 1, 2)
"""The taps of `config`."""
ROWS = 12
"""How many conversations `write_rows` writes unless it is told."""


def write_rows(path: Path, rows: int = ROWS, length: int = 50, seed: int = 0) -> Path:
    """Write conversations of random token ids with two turns each as JSONL; each is 7 tokens longer than the last."""
    rng = np.random.default_rng(seed)
    with path.open("w") as file:
        for number in range(rows):
            size = length + 7 * number
            mask = [0] * size
            mask[10:20] = [1] * 10
            mask[30 : size - 3] = [1] * (size - 33)
            file.write(json.dumps({"token_ids": rng.integers(0, 440, size).tolist(), "loss_mask": mask}) + "\n")
    return path


def prepare_rows(output: Path, tokenizer: Path, train: Path, val: Path | None = None) -> Path:
    """Prepare the rows of these files, with a draft vocabulary of 200 ids, and give the dataset's directory back.

    `val` is held out: it is not counted into the draft vocabulary.
    """
    prepare(
        PrepareConfig(
            tokenizer=tokenizer,
            output=output,
            splits={"train": [train]},
            held_out={} if val is None else {"val": [val]},
            draft_vocab_size=200,
            workers=1,
            progress=False,
        )
    )
    return output


def small_dataset(root: Path, tokenizer: Path) -> Path:
    """Prepare ROWS conversations to train on and three that are held out, all below `root`."""
    val = write_rows(root / "val.jsonl", rows=3, seed=1)
    return prepare_rows(root / "prepared", tokenizer, write_rows(root / "rows.jsonl"), val)


def config(verifier: Path, dataset: Path, output: Path, **changes: Any) -> CaptureConfig:
    """Return settings of a job of several shards on the CPU, with a window shorter than the conversations."""
    values: dict[str, Any] = {
        "verifier": verifier, "dataset": dataset, "output": output, "layers": LAYERS, "top_k": 16,
        "window": 20, "shard_tokens": 200, "head_slice": 7, "device": "cpu",
    }  # fmt: skip
    return CaptureConfig(**values | changes)


def flags(settings: CaptureConfig) -> list[str]:
    """Return the command line's flags of every setting that differs from its default."""
    found = []
    for item in fields(settings):
        value = getattr(settings, item.name)
        if value is True:
            found.append(f"--{item.name.replace('_', '-')}")
        elif value != item.default:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            found += [f"--{item.name.replace('_', '-')}", text]
    return found
