"""What training on rounded states costs: acceptance of drafts trained on int8 and fp8 stores beside lossless ones.

`python -m draftcache.tools.bench.lossy_modes --demo runs/demo [--output FILE]` takes the traces of a finished
`draftcache demo`, converts their store to each mode, and trains a draft from scratch per mode and seed, in the same
order and for the same steps. Every draft is evaluated on the exact states, because a served draft reads exact states.
`acceptance_length` is the mean over seeds; `difference` is the mean of the paired differences to `lossless`,
`difference_ci95` the half-width of its 95 % interval by Student's t over the seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from draftcache.tools.bench.parts import demo_training
from draftcache.tools.result_rows import cpu_name, report

MODES = ("lossless", "int8", "fp8")


def main() -> None:
    """Convert the stores, train and evaluate the drafts, and report. Finished parts are not repeated."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--demo", type=Path, required=True, metavar="DIRECTORY", help="output of `draftcache demo`")
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds: expected at least 2")
    figures = {mode: [acceptance(arguments, mode, seed) for seed in range(arguments.seeds)] for mode in MODES}
    report(demo_training.rows(figures, cpu_name(), spread=False), arguments.output)


def acceptance(arguments: argparse.Namespace, mode: str, seed: int) -> dict[str, float]:
    """Return the acceptance length of one draft by split."""
    exact = arguments.demo / "stores" / "traces"
    directory = arguments.demo / "lossy_modes"
    store = exact if mode == "lossless" else directory / f"store-{mode}"
    if store != exact:
        demo_training.draftcache("convert", exact, store, "--mode", mode)
    run = directory / f"{mode}-{seed}"
    found = demo_training.acceptance(store, exact, run, (), seed=seed, epochs=arguments.epochs, device=arguments.device)
    return {split: float(figures["acceptance_length"]) for split, figures in found.items()}


if __name__ == "__main__":
    main()
