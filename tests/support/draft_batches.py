"""Batches of synthetic conversations for the tiny draft of `draft_models`."""

from __future__ import annotations

import numpy as np

from draftcache.draft_train.data.batches import Batch, build_batch
from support.draft_models import STEPS, WINDOW
from support.synthetic import conversation, manifest, turns

MASKS = {
    "one turn": turns(24, (9, 20)),
    "three turns": turns(40, (4, 9), (13, 15), (20, 38)),
    "to the end": turns(20, (3, 20)),
    "from the start": turns(16, (0, 10)),
    "one-token turn between": turns(30, (5, 10), (12, 13), (18, 28)),
}
"""Loss masks, bool [L] each, by what is particular about them."""


def batch_of(names: list[str], window: int | None) -> Batch:
    """Put the conversations whose masks have these names in MASKS into one batch."""
    rng = np.random.default_rng(1)
    items = [conversation(rng, MASKS[name]) for name in names]
    return build_batch(items, manifest().codec, max_steps=STEPS, window=window)


def batches(**asked: bool) -> tuple[Batch, list[Batch]]:
    """Put two conversations of unlike lengths into one batch, and also each into a batch of its own.

    `asked` are further arguments of `build_batch`.
    """
    rng = np.random.default_rng(0)
    items = [conversation(rng, mask) for mask in (turns(30, (5, 25)), turns(20, (3, 6), (9, 19)))]
    make = lambda chosen: build_batch(chosen, manifest().codec, max_steps=STEPS, window=WINDOW, **asked)  # noqa: E731
    return make(items), [make([item]) for item in items]
