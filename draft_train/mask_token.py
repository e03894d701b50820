"""The mask token of block drafts: the id whose embedding stands in the slots that are to be predicted.

It must not occur in the data: a conversation that held it would teach the draft that the token means nothing.
"""

from __future__ import annotations

from dataclasses import replace
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.setting_tables import BLOCKS
from draftcache.store.common.errors import InputError
from draftcache.store.common.progress import progress_bar
from draftcache.store.reader import StoreReader


def with_mask_token(config: TrainConfig, store: StoreReader) -> TrainConfig:
    """Return the settings with the mask token that is asked for, or with one that the store does not have.

    The choice is the verifier's padding token if no conversation has it, else the largest id that none has. Settings of
    drafts without a mask token are returned as they are. Raises InputError where the token occurs in the store, or
    every id does.
    """
    if config.draft not in BLOCKS:
        return config
    counts = token_counts(store)
    chosen = config.mask_token_id
    if chosen < 0:
        absent = np.flatnonzero(counts == 0)
        if not absent.size:
            raise InputError(
                f"{store.location}: expected a token id that no conversation has, for the mask token of --draft "
                f"{config.draft}, found all {len(counts)} in use"
            )
        padding = store.manifest.verifier.get("pad_token_id")
        chosen = int(padding) if isinstance(padding, int) and padding in absent else int(absent[-1])
    elif chosen < len(counts) and counts[chosen]:
        raise InputError(
            f"{store.location}: --mask-token-id {chosen}: expected a token that no conversation has, found it "
            f"{counts[chosen]} times; leave the flag out to have one chosen"
        )
    return replace(config, mask_token_id=chosen)


_counted: WeakKeyDictionary[StoreReader, NDArray[np.int64]] = WeakKeyDictionary()
"""By opened store, its token counts: the trials of a sweep ask for them again and again."""


def token_counts(store: StoreReader) -> NDArray[np.int64]:
    """Return how often each of the verifier's token ids occurs in a store, [vocabulary] int64."""
    if store not in _counted:
        _counted[store] = _count(store)
    return _counted[store]


def _count(store: StoreReader) -> NDArray[np.int64]:
    counts = np.zeros(int(store.manifest.verifier["vocab_size"]), np.int64)
    with progress_bar(total=len(store), desc="looking for a mask token", unit=" conversations") as bar:
        for number in range(len(store)):
            found = np.bincount(store.read(number, ["token_ids"]).arrays["token_ids"], minlength=len(counts))
            counts += found[: len(counts)]
            bar.update(1)
    return counts
