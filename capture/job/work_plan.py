"""The plan of a job: which conversations each shard holds.

The plan is a pure function of the dataset, the splits and `--shard-tokens`, so every process that works on a store,
now or after a kill, has the same plan, and the finished store does not depend on which worker captured which shard.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.prepare.token_dataset import TokenDataset
from draftcache.store.common.errors import InputError


@dataclass(frozen=True)
class ShardPlan:
    """One shard's conversations, numbers `first .. last - 1` of one split, and the number of their tokens."""

    split: int
    first: int
    last: int
    tokens: int


@dataclass(frozen=True)
class WorkPlan:
    """The dataset's splits in order, and the shards that they are cut into."""

    dataset: TokenDataset
    splits: tuple[str, ...]
    shards: list[ShardPlan]

    @classmethod
    def of(cls, config: CaptureConfig) -> WorkPlan:
        """The plan of a job. Raises InputError where there is no prepared dataset, or a split is not in it."""
        dataset = TokenDataset.open(config.dataset)
        splits = config.splits or tuple(dataset.splits)
        unknown = [name for name in splits if name not in dataset.splits]
        if unknown:
            raise InputError(f"{config.dataset}: expected splits among {list(dataset.splits)}, found {unknown}")
        if len(set(splits)) != len(splits):
            raise InputError(f"--splits: expected every split once, found {','.join(splits)}")
        return cls(dataset=dataset, splits=splits, shards=plan_shards(dataset, splits, config.shard_tokens))

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation."""
        return max(int(self.dataset.split(name).conversations["tokens"].max(initial=0)) for name in self.splits)

    def tokens(self, shards: Collection[int]) -> int:
        """Tokens of the shards of these numbers."""
        return sum(self.shards[shard].tokens for shard in shards)

    def first(self, count: int) -> list[tuple[str, int]]:
        """The first `count` conversations, or all where there are fewer, as (split, number in the split)."""
        numbered = ((name, number) for name in self.splits for number in range(len(self.dataset.split(name))))
        return list(itertools.islice(numbered, count))

    def spread(self, count: int) -> list[tuple[str, int]]:
        """`count` conversations, or all where there are fewer, at even steps; each as (split, number in the split)."""
        sizes = [len(self.dataset.split(name).conversations) for name in self.splits]
        ends = np.cumsum(sizes)
        numbers = np.linspace(0, max(int(ends[-1]) - 1, 0), min(count, int(ends[-1]))).round().astype(int)
        splits = np.searchsorted(ends, numbers, side="right")
        return [
            (self.splits[split], int(number - (ends[split] - sizes[split])))
            for number, split in zip(numbers.tolist(), splits.tolist(), strict=True)
        ]


def plan_shards(dataset: TokenDataset, splits: tuple[str, ...], shard_tokens: int) -> list[ShardPlan]:
    """Fill shards in the dataset's order: a shard ends once it holds `shard_tokens` tokens, or with its split."""
    plan = []
    for split, name in enumerate(splits):
        lengths = np.asarray(dataset.split(name).conversations["tokens"])
        first, tokens = 0, 0
        for number, length in enumerate(lengths):
            tokens += int(length)
            if tokens >= shard_tokens or number + 1 == len(lengths):
                plan.append(ShardPlan(split=split, first=first, last=number + 1, tokens=tokens))
                first, tokens = number + 1, 0
    return plan
