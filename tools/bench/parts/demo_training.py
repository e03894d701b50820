"""Train drafts on a finished demo's traces under several recipes and seeds, and compare their acceptance."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from draftcache.store.common.files import read_json
from draftcache.tools.demo.pipeline import TRACE_SPLITS
from draftcache.tools.result_rows import result_row
from draftcache.tools.students_t import half_width

DRAFT_FLAGS = (
    "--learning-rate", 2e-3, "--weight-decay", 0.3, "--beta2", 0.99, "--batch-conversations", 2,
    "--sliding-window", 512, "--intermediate-size", 512, "--num-attention-heads", 4, "--num-key-value-heads", 2,
    "--head-dim", 64, "--ttt-steps", 5,
)  # fmt: skip
"""The settings of the demo's stage 2, for training from scratch."""


def acceptance(
    store: Path, exact: Path, run: Path, flags: Sequence[object], *, seed: int, epochs: int, device: str
) -> dict[str, Any]:
    """Train a draft on `store` in the directory `run`, and evaluate it on the states of the store `exact`.

    A finished training or evaluation is not repeated. Returns the draft's figures, as `draftcache eval` writes them,
    by split. Raises CalledProcessError if a command fails.
    """
    draftcache(
        "train", "--store", store, "--splits", "traces", "--output", run, "--seed", seed, "--epochs", epochs,
        *DRAFT_FLAGS, "--device", device, *flags,
    )  # fmt: skip
    result = run / "acceptance.json"
    if not result.exists():
        draftcache(
            "eval", "--store", exact, "--checkpoint", run, "--splits", ",".join(TRACE_SPLITS), "--device", device,
            "--bigram-splits", "traces", "--output", result,
        )  # fmt: skip
    return {split: read_json(result)["splits"][split]["draft"] for split in TRACE_SPLITS}


def rows(figures: Mapping[str, Sequence[Mapping[str, float]]], device: str, *, spread: bool) -> list[dict[str, Any]]:
    """Return result rows: means over seeds, standard deviations if `spread`, paired differences to the first recipe.

    `figures` holds, by recipe, one {split: acceptance length} per seed; the split "" stands for all splits together.
    """
    first = next(iter(figures))
    found = []
    for recipe, by_seed in figures.items():
        for split in by_seed[0]:
            lengths = np.array([item[split] for item in by_seed])
            case = f"{recipe}/{split}" if split else recipe
            values = {"acceptance_length": float(lengths.mean())}
            if spread:
                values["acceptance_length_std"] = float(lengths.std(ddof=1))
            if recipe != first:
                change = lengths - np.array([item[split] for item in figures[first]])
                values["difference"] = float(change.mean())
                values["difference_ci95"] = half_width(change.tolist())
            found += [result_row(case, metric, value, "tokens/step", device) for metric, value in values.items()]
    return found


def draftcache(*words: object) -> None:
    """Print and run one `draftcache` command. Raises CalledProcessError if it fails."""
    command = [sys.executable, "-m", "draftcache.tools.cli", *map(str, words)]
    print("$ draftcache", *words, flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
