"""What training on rounded states costs: acceptance of drafts trained on int8 and fp8 stores beside lossless ones.

`python -m tools.bench.lossy_modes --demo runs/demo [--output FILE]` takes the traces of a finished `draftcache demo`,
converts their store to each mode, and trains a draft from scratch per mode and seed: same order, same steps. Every
draft is evaluated on the exact states, which are what it meets when it is served. `acceptance_length` is the mean over
seeds; `difference` is the mean of the paired differences to `lossless`, `difference_ci95` the half-width of its 95 %
interval by Student's t over the seeds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from store.files import read_json
from tools.bench.rows import cpu_name, report, result_row
from tools.demo.pipeline import TRACE_SPLITS

MODES = ("lossless", "int8", "fp8")
_T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t, 97.5 %, by degrees of freedom."""


def main() -> None:
    """Convert, train, evaluate; finished parts are taken as they are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--demo", type=Path, required=True, metavar="DIRECTORY", help="output of `draftcache demo`")
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.seeds - 1 not in _T_975:
        parser.error("--seeds: expected 2 to 10")
    figures = {mode: [acceptance(arguments, mode, seed) for seed in range(arguments.seeds)] for mode in MODES}
    report(rows(figures, cpu_name()), arguments.output)


def acceptance(arguments: argparse.Namespace, mode: str, seed: int) -> dict[str, float]:
    """Acceptance length per split of one draft."""
    exact = arguments.demo / "stores" / "traces"
    directory = arguments.demo / "lossy_modes"
    store = exact if mode == "lossless" else directory / f"store-{mode}"
    if store != exact:
        _draftcache("convert", exact, store, "--mode", mode)
    run = directory / f"{mode}-{seed}"
    _draftcache(
        "train", "--store", store, "--splits", "traces", "--output", run, "--seed", seed, "--epochs", arguments.epochs,
        "--learning-rate", 2e-3, "--weight-decay", 0.3, "--beta2", 0.99, "--batch-conversations", 2,
        "--sliding-window", 512, "--intermediate-size", 512, "--num-attention-heads", 4, "--num-key-value-heads", 2,
        "--head-dim", 64, "--ttt-steps", 5, "--device", arguments.device,
    )  # fmt: skip
    result = run / "acceptance.json"
    if not result.exists():
        _draftcache(
            "eval", "--store", exact, "--checkpoint", run, "--splits", ",".join(TRACE_SPLITS), "--device",
            arguments.device, "--bigram-splits", "traces", "--output", result,
        )  # fmt: skip
    return {split: float(read_json(result)["splits"][split]["draft"]["acceptance_length"]) for split in TRACE_SPLITS}


def rows(figures: dict[str, list[dict[str, float]]], device: str) -> list[dict[str, Any]]:
    """Means, and paired differences to the first mode."""
    found = []
    for mode, by_seed in figures.items():
        for split in by_seed[0]:
            lengths = np.array([item[split] for item in by_seed])
            case = f"{mode}/{split}"
            found.append(result_row(case, "acceptance_length", float(lengths.mean()), "tokens/step", device))
            if mode != MODES[0]:
                change = lengths - np.array([item[split] for item in figures[MODES[0]]])
                half = _T_975[len(change) - 1] * float(change.std(ddof=1)) / len(change) ** 0.5
                found.append(result_row(case, "difference", float(change.mean()), "tokens/step", device))
                found.append(result_row(case, "difference_ci95", half, "tokens/step", device))
    return found


def _draftcache(*words: object) -> None:
    command = [sys.executable, "-m", "tools.cli", *map(str, words)]
    print("$ draftcache", *words, flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=Path(__file__).parents[2])


if __name__ == "__main__":
    main()
