"""Checks of a training run's settings that need its ranks or its store, made before any work."""

from __future__ import annotations

import sys

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.ranks import Ranks
from draftcache.store.common.errors import InputError
from draftcache.store.reader import StoreReader


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


def require_norm(config: TrainConfig, store: StoreReader) -> None:
    """Raise InputError if the draft's RMS norm is to start as a final norm of the verifier that is none."""
    found = store.manifest.verifier.get("final_norm", "rms_norm")
    if config.head_init == "verifier" and found != "rms_norm":
        raise InputError(
            f"{store.location}: expected a verifier with an RMS norm before its head for --head-init verifier, as the "
            f"draft has one, found {found!r}; its weights mean something else there: use --head-init random"
        )
