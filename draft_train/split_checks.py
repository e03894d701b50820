"""Checks of the splits that a command names, made as soon as the store is open and before any work."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from draftcache.draft_train.config import TrainConfig
from draftcache.store.common.errors import InputError
from draftcache.store.reader import StoreReader


def members_of(store: StoreReader, splits: Sequence[str], flag: str) -> NDArray[np.int64]:
    """Return the numbers of the conversations of these splits, [n] int64, one split after the other.

    Raises InputError, which names `flag`, where no split is named, one is named twice or is not in the store, or all
    are empty.
    """
    if not splits or len(set(splits)) < len(splits):
        raise InputError(f"{flag}: expected at least one split and every split once, found {list(splits)}")
    try:
        members = np.concatenate([store.members(split) for split in splits])
    except InputError as exc:
        raise InputError(f"{flag}: {exc}") from exc
    if members.size == 0:
        raise InputError(f"{flag}: {store.location}: expected conversations in {list(splits)}, found none")
    return members


def trained_members(store: StoreReader, config: TrainConfig) -> NDArray[np.int64]:
    """Return the numbers [M] int64 of the conversations that a run trains on.

    Of a share, those whose content hashes come first are taken, so that a smaller share is a part of a larger one and
    does not depend on the order of the store. Raises InputError as `members_of` does.
    """
    members = members_of(store, config.splits, "--splits")
    if config.data_share == 1:
        return members
    count = math.ceil(config.data_share * members.size)
    hashes = store.index["content_hash"]
    chosen = set(sorted(members.tolist(), key=lambda number: hashes[number].tobytes())[:count])
    return members[[number in chosen for number in members.tolist()]]


def shared_conversations(store: StoreReader, split: str, others: Sequence[str]) -> int:
    """Return how many conversations of `split` are in one of the `others` too: the same tokens and loss mask."""
    hashes = store.index["content_hash"]
    seen = {content for other in others for content in hashes[store.members(other)].tolist()}
    return sum(content in seen for content in hashes[store.members(split)].tolist())


def held_out_members(store: StoreReader, config: TrainConfig, *, say: bool) -> NDArray[np.int64]:
    """Return the numbers [M] int64 of the conversations that a run evaluates on; none without --eval-split.

    With `say`, print where training and evaluation share conversations. Raises InputError for an unknown split.
    """
    split = config.eval_split
    members = np.empty(0, np.int64) if split is None else members_of(store, [split], "--eval-split")
    if say:
        warn_of_repeated(store, config.splits)
        if split is not None:
            warn_of_trained(store, split, config.splits)
    return members[: config.eval_conversations]


def warn_of_repeated(store: StoreReader, splits: Sequence[str]) -> None:
    """Say on stderr where conversations of a split to train on are in a split before it too."""
    for number, split in enumerate(splits[1:], start=1):
        if shared := shared_conversations(store, split, splits[:number]):
            print(
                f"{store.location}: {shared} of {store.members(split).size} conversations of {split!r} are also in "
                f"{list(splits[:number])}: an epoch trains on them more than once",
                file=sys.stderr,
            )


def warn_of_trained(store: StoreReader, split: str, trained: Sequence[str]) -> None:
    """Say on stderr where conversations of a split to measure on are trained on, which may be meant."""
    if shared := shared_conversations(store, split, trained):
        print(
            f"{store.location}: {shared} of {store.members(split).size} conversations of {split!r} are trained on, "
            f"as they are in {list(trained)}: acceptance on them says nothing of new ones; choose a held-out split",
            file=sys.stderr,
        )
