"""Which conversations of a store go into which shard of a copy of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from draftcache.store.format.commits import Record


@dataclass(frozen=True)
class ShardPlan:
    """One shard of the copy: rows `first .. last-1` of the source's index, all of one split."""

    first: int
    last: int
    split: int


def plan_shards(index: NDArray[np.void], records: Sequence[Record], shard_tokens: int | None) -> Iterator[ShardPlan]:
    """Yield the copy's shards, for the source's `index` and the commit records of its shards.

    They are the source's shards, or with `shard_tokens` conversations in order until there are that many tokens, never
    of two splits.
    """
    if shard_tokens is None:
        ends = np.cumsum([record["conversations"] for record in records])
        for record, end in zip(records, ends.tolist(), strict=True):
            first = end - record["conversations"]
            yield ShardPlan(first, end, int(index["split"][first]) if end > first else 0)
        return
    first = tokens = 0
    for number in range(len(index)):
        tokens += int(index["tokens"][number])
        last_of_split = number + 1 == len(index) or index["split"][number + 1] != index["split"][number]
        if tokens >= shard_tokens or last_of_split:
            yield ShardPlan(first, number + 1, int(index["split"][number]))
            first, tokens = number + 1, 0
