"""What the objective is worth: acceptance of drafts trained by our default beside other recipes, at equal steps.

`python -m draftcache.tools.bench.train_quality --demo runs/demo [--recipes draftcache,specforge] [--output FILE]` takes
the traces of a finished `draftcache demo` and trains a draft from scratch per recipe and seed, with the same store,
initial weights, order, optimizer and steps. A draft takes about 100 s on two cores, so the default two recipes and
three seeds take 10 minutes. The recipes are:

- `draftcache`: the defaults.
- `specforge`: SpecForge 0.2's objective: its unshifted loss mask, its mean over all positions, and no loss where the
  verifier's argmax is outside the draft vocabulary. Its target is the verifier's softmax over the draft vocabulary, of
  which the store has the best 64 entries and the mass of the rest, so `tail-kl` is the nearest loss. Its optimizer, its
  random initial head and its attention without a window are not compared, because they don't belong to the objective.
- `renormalized`: the defaults, except for the loss, which treats the stored top-k as the whole distribution.
- `tv`, `lk`, `lk-alpha`: the defaults, except for the loss, which is the one of this name.

Cases are `quality-RECIPE`, over all tokens of the held-out splits, and `quality-RECIPE/SPLIT`. `acceptance_length` is
the mean over seeds, `acceptance_length_std` their standard deviation; `difference` is the mean of the paired
differences to the first recipe, `difference_ci95` the half-width of its 95 % interval by Student's t over the seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from draftcache.tools.bench.parts import demo_training
from draftcache.tools.result_rows import cpu_name, report

RECIPES: dict[str, tuple[str, ...]] = {
    "draftcache": (),
    "specforge": ("--loss-rows", "unshifted", "--out-of-vocab", "drop"),
    "renormalized": ("--loss", "renormalized-kl"),
    "tv": ("--loss", "tv"),
    "lk": ("--loss", "lk"),
    "lk-alpha": ("--loss", "lk-alpha"),
}


def main() -> None:
    """Train and evaluate the drafts, and report. Finished drafts are not trained again."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--demo", type=Path, required=True, metavar="DIRECTORY", help="output of `draftcache demo`")
    parser.add_argument("--recipes", default="draftcache,specforge", help=f"of {', '.join(RECIPES)} (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    recipes = arguments.recipes.split(",")
    if unknown := [recipe for recipe in recipes if recipe not in RECIPES]:
        parser.error(f"--recipes: expected some of {list(RECIPES)}, found {unknown}")
    if arguments.seeds < 2:
        parser.error("--seeds: expected at least 2")
    by_seed = [{recipe: quality(arguments, recipe, seed) for recipe in recipes} for seed in range(arguments.seeds)]
    figures = {f"quality-{recipe}": [item[recipe] for item in by_seed] for recipe in recipes}
    report(demo_training.rows(figures, cpu_name(), spread=True), arguments.output)


def quality(arguments: argparse.Namespace, recipe: str, seed: int) -> dict[str, float]:
    """Return the acceptance length of one draft over all held-out tokens (under the name "") and by split."""
    store = arguments.demo / "stores" / "traces"
    found = demo_training.acceptance(
        store,
        store,
        arguments.demo / "train_quality" / f"{recipe}-{seed}",
        RECIPES[recipe],
        seed=seed,
        epochs=arguments.epochs,
        device=arguments.device,
    )
    return pooled(found) | {split: float(figures["acceptance_length"]) for split, figures in found.items()}


def pooled(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the tokens per verify step over all splits together, under the name ""."""
    tokens, steps = (sum(int(figures[name]) for figures in found.values()) for name in ("tokens", "verify_steps"))
    return {"": tokens / steps}


if __name__ == "__main__":
    main()
