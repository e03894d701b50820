"""The mask token of block drafts: the id whose embedding stands in the slots that are to be predicted.

It must not occur in the data: a conversation that held it would teach the draft that the token means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from queue import SimpleQueue
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray

from draftcache.draft_train.checkpoint import checkpoints
from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.data.prefetch import reader_threads
from draftcache.draft_train.drafts.block.shape import BlockShape
from draftcache.draft_train.ranks import Ranks
from draftcache.draft_train.setting_tables import BLOCKS
from draftcache.draft_train.state_file import read_state
from draftcache.store.common.errors import DraftcacheError, InputError
from draftcache.store.common.progress import progress_bar
from draftcache.store.reader import StoreReader

_PART = 256
"""Conversations that a thread counts at a time."""


def with_mask_token(config: TrainConfig, store: StoreReader, ranks: Ranks | None = None) -> TrainConfig:
    """Return the settings with the mask token that is asked for, or with one that the store does not have.

    The choice is the verifier's padding token if no conversation has it, else the largest id that none has. Settings of
    drafts without a mask token are returned as they are. A run that goes on keeps its token, which was looked for when
    it began. `ranks`, all of which must call this, each look through a part of the store. Raises InputError where the
    token occurs in the store, or every id does.
    """
    if config.draft not in BLOCKS:
        return config
    chosen = config.mask_token_id
    known = _token_of_the_run(config, store, ranks)
    if known >= 0 and chosen in (-1, known):
        return replace(config, mask_token_id=known)
    counts = token_counts(store, ranks)
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


def _token_of_the_run(config: TrainConfig, store: StoreReader, ranks: Ranks | None) -> int:
    """Return the mask token of the newest checkpoint of this run on this store, as rank 0 finds it; -1 for none."""
    token = torch.tensor([-1], device=ranks.device if ranks else None)
    found = checkpoints(config.output)
    if found and (ranks is None or ranks.leads):
        with suppress(DraftcacheError):  # resuming from it says what is wrong
            state, _ = read_state(found[-1])
            if isinstance(state.shape, BlockShape) and state.store_hash == store.manifest.hash:
                token[0] = state.shape.mask_token_id
    if ranks is not None:
        ranks.copy_from_leader([token])
    return int(token)


_counted: WeakKeyDictionary[StoreReader, NDArray[np.int64]] = WeakKeyDictionary()
"""By opened store, its token counts: the trials of a sweep ask for them again and again."""


def token_counts(store: StoreReader, ranks: Ranks | None = None) -> NDArray[np.int64]:
    """Return how often each of the verifier's token ids occurs in a store, [vocabulary] int64."""
    if store not in _counted:
        _counted[store] = _count(store, ranks)
    return _counted[store]


def _count(store: StoreReader, ranks: Ranks | None) -> NDArray[np.int64]:
    """Count with as many threads as training reads with; a rank's part are whole runs of conversations."""
    rank, world = (ranks.rank, ranks.world) if ranks else (0, 1)
    parts = [range(at, min(at + _PART, len(store))) for at in range(0, len(store), _PART)][rank::world]
    threads = min(reader_threads(store), max(len(parts), 1))
    readers: SimpleQueue[StoreReader] = SimpleQueue()
    opened = [store.another() for _ in range(threads)]
    for reader in opened:
        readers.put(reader)
    total = np.zeros(int(store.manifest.verifier["vocab_size"]), np.int64)

    def count(numbers: Sequence[int]) -> NDArray[np.int64]:
        reader = readers.get()
        try:
            ids = [reader.read(number, ["token_ids"]).arrays["token_ids"] for number in numbers]
        finally:
            readers.put(reader)
        return np.bincount(np.concatenate(ids), minlength=len(total))[: len(total)]

    try:
        with (
            ThreadPoolExecutor(threads, thread_name_prefix="count") as pool,
            progress_bar(
                total=sum(map(len, parts)), desc="looking for a mask token", unit=" conversations", disable=rank > 0
            ) as bar,
        ):
            for part, counts in zip(parts, pool.map(count, parts), strict=True):
                total += counts
                bar.update(len(part))
    finally:
        for reader in opened:
            reader.close()
    if ranks is not None:
        total[:] = ranks.add_up(torch.from_numpy(total).to(ranks.device)).cpu().numpy()
    return total
