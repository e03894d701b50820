"""Which conversations make each optimizer step: a pure function of settings, seed and epoch.

So (epoch, step) is all that a resume needs, and any number of ranks trains on the same batches in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Numbers: TypeAlias = NDArray[np.int64]


def epoch_batches(members: Numbers, tokens: Numbers, *, order: str, seed: int, epoch: int, size: int) -> list[Numbers]:
    """Conversations `members` of `tokens` tokens each, cut into batches of `size`, of which the last cut is smaller.

    "shuffle" permutes the conversations. "bucketed" sorts them by length and permutes only the batches, so that those
    of one step take ranks the same time, at the price of steps that are less of a sample.
    """
    draw = np.random.default_rng([seed, epoch])
    if order == "shuffle":
        return _cut(draw.permutation(members), size)
    batches = _cut(members[np.argsort(tokens, kind="stable")], size)
    return [batches[number] for number in draw.permutation(len(batches))]


def _cut(numbers: Numbers, size: int) -> list[Numbers]:
    return [numbers[first : first + size] for first in range(0, len(numbers), size)]


def micro_batches(numbers: Numbers, tokens: Numbers, limit: int) -> list[Numbers]:
    """Pack conversations into micro-batches of at most `limit` tokens, a longer one alone; `limit` 0: each alone.

    First fit, longest first. How they are packed changes no gradient but by rounding.
    """
    parts: list[list[int]] = []
    room: list[int] = []
    for place in np.argsort(-tokens, kind="stable"):
        length = int(tokens[place])
        part = next((part for part, free in enumerate(room) if length <= free), None)
        if part is None:
            parts.append([])
            room.append(limit)
            part = len(parts) - 1
        parts[part].append(int(numbers[place]))
        room[part] -= length
    return [np.array(part, np.int64) for part in parts]


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step."""

    conversations: Numbers
    """Of the whole step, on all ranks."""
    parts: list[Numbers]
    """This rank's micro-batches; none where the step has fewer conversations than there are ranks."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """All steps of a run, as one rank sees them: it takes every `world`-th conversation of each step."""

    members: Numbers
    """Conversations to train on."""
    tokens: Numbers
    """[all conversations of the store]: their lengths."""
    order: str
    seed: int
    epochs: int
    batch_conversations: int
    pack_tokens: int
    rank: int = 0
    world: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """The last one may be smaller."""
        return -(-len(self.members) // self.batch_conversations)

    @property
    def total_steps(self) -> int:
        """Of all epochs."""
        return self.steps_per_epoch * self.epochs

    def steps(self, first: int = 0) -> Iterator[StepPlan]:
        """Steps `first` .. total_steps-1."""
        for epoch in range(first // self.steps_per_epoch, self.epochs):
            batches = epoch_batches(
                self.members,
                self.tokens[self.members],
                order=self.order,
                seed=self.seed,
                epoch=epoch,
                size=self.batch_conversations,
            )
            for chosen in batches[max(0, first - epoch * self.steps_per_epoch) :]:
                mine = chosen[self.rank :: self.world]
                yield StepPlan(chosen, micro_batches(mine, self.tokens[mine], self.pack_tokens))
