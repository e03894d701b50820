"""Rows of the recipes' comparison by hand, and that every recipe is one that training takes."""

from __future__ import annotations

import argparse

import numpy as np
import pytest

from draftcache.draft_train.config import TrainConfig
from draftcache.tools.arguments import add_settings, read_settings
from draftcache.tools.bench.parts.demo_training import DRAFT_FLAGS, rows
from draftcache.tools.bench.train_quality import RECIPES, pooled


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_settings_of_a_run(recipe: str) -> None:
    parser = argparse.ArgumentParser()
    add_settings(parser, TrainConfig)
    words = ["--store", "s", "--output", "o", "--splits", "traces", *map(str, DRAFT_FLAGS)]
    plain, made = (
        read_settings(TrainConfig, parser.parse_args([*words, *flags])).objective() for flags in ((), RECIPES[recipe])
    )
    changed = {name for name in plain if plain[name] != made[name]}
    assert changed == {flag[2:].replace("-", "_") for flag in RECIPES[recipe][::2]}
    assert (recipe == "draftcache") == (not changed)


def test_differences_are_paired_by_seed() -> None:
    figures = {"quality-a": [{"": 2.0}, {"": 3.0}, {"": 4.0}], "quality-b": [{"": 2.5}, {"": 3.4}, {"": 4.6}]}
    found = {(row["case"], row["metric"]): row["value"] for row in rows(figures, "cpu", spread=True)}
    assert found == {
        ("quality-a", "acceptance_length"): 3.0,
        ("quality-a", "acceptance_length_std"): 1.0,
        ("quality-b", "acceptance_length"): pytest.approx(3.5),
        ("quality-b", "acceptance_length_std"): pytest.approx(np.std([2.5, 3.4, 4.6], ddof=1)),
        ("quality-b", "difference"): pytest.approx(0.5),
        ("quality-b", "difference_ci95"): pytest.approx(4.303 * 0.1 / 3**0.5),
    }


def test_pooled_figures_weigh_splits_by_their_steps() -> None:
    assert pooled({"a": {"tokens": 30, "verify_steps": 10}, "b": {"tokens": 10, "verify_steps": 10}}) == {"": 2.0}
