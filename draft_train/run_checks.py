"""Checks of a training run's settings that need its ranks or its store, made before any work."""

from __future__ import annotations

import sys

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.ranks import Ranks
from draftcache.store.common.errors import InputError


def require_work(config: TrainConfig, ranks: Ranks) -> None:
    """Raise InputError if a rank would never get a conversation; warn if ranks get different numbers of them."""
    size, world = config.batch_conversations, ranks.world
    problem = None
    if size < world:
        problem = InputError(
            f"--batch-conversations: expected at least one for each of the {world} ranks, found {size}: it counts "
            f"those of all ranks; pass a multiple of {world}, or start fewer ranks"
        )
    ranks.agree(problem)  # not raised before: ranks that still connect would wait for this one
    if size % world and ranks.leads:
        print(
            f"draftcache train: {world} ranks share steps of {size} conversations, so some wait for others in every "
            f"step; a multiple of {world} keeps all of them busy",
            file=sys.stderr,
        )
