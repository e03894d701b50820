"""Which conversations make up each optimizer step: a pure function of settings, seed and epoch.

A run therefore needs only its step to resume, and any number of ranks trains on the same batches in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Numbers: TypeAlias = NDArray[np.int64]


def epoch_batches(members: Numbers, tokens: Numbers, *, order: str, seed: int, epoch: int, size: int) -> list[Numbers]:
    """Return the conversations `members` [M] in batches of `size`; the batch that is cut last may be smaller.

    `tokens` [M] are their lengths. Order "shuffle" permutes the conversations. Order "bucketed" sorts them by length
    and permutes only the batches, so that all ranks take the same time for a step, at the price of steps whose
    conversations are a less random sample.
    """
    draw = np.random.default_rng([seed, epoch])
    if order == "shuffle":
        return _cut(draw.permutation(members), size)
    batches = _cut(members[np.argsort(tokens, kind="stable")], size)
    return [batches[number] for number in draw.permutation(len(batches))]


def _cut(numbers: Numbers, size: int) -> list[Numbers]:
    return [numbers[first : first + size] for first in range(0, len(numbers), size)]


def micro_batches(numbers: Numbers, tokens: Numbers, limit: int) -> list[Numbers]:
    """Pack conversations `numbers` [M] of `tokens` [M] tokens into micro-batches of at most `limit` tokens.

    A conversation that is longer than `limit` is alone in its micro-batch; with `limit` 0 every one is. The packing is
    first fit, longest first. It changes gradients only by rounding.
    """
    parts: list[list[int]] = []
    room: list[int] = []
    for index in np.argsort(-tokens, kind="stable"):
        length = int(tokens[index])
        part = next((part for part, free in enumerate(room) if length <= free), None)
        if part is None:
            parts.append([])
            room.append(limit)
            part = len(parts) - 1
        parts[part].append(int(numbers[index]))
        room[part] -= length
    return [np.array(part, np.int64) for part in parts]


def share_of_rank(numbers: Numbers, tokens: Numbers, rank: int, world: int) -> Numbers:
    """Return those of a step's conversations `numbers` [M], of `tokens` [M] tokens, that one of `world` ranks takes.

    The longest goes to the rank that has the fewest tokens so far, and so on, so that no rank waits long for another.
    Which rank takes a conversation changes gradients only by rounding.
    """
    loads = [0] * world
    mine = []
    for index in np.argsort(-tokens, kind="stable"):
        least = loads.index(min(loads))
        loads[least] += int(tokens[index])
        if least == rank:
            mine.append(int(index))
    return numbers[np.sort(np.array(mine, np.int64))]


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step."""

    conversations: Numbers
    """Conversations of the whole step, on all ranks."""
    parts: list[Numbers]
    """This rank's micro-batches. There may be none if the step has fewer conversations than the run has ranks."""
    epoch: int
    """The epoch, counted from 0."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """All steps of a run for one of its `world` ranks, which share the conversations of each step by their lengths."""

    members: Numbers
    """Conversations to train on."""
    tokens: Numbers
    """Length of every conversation of the store, in tokens."""
    order: str
    seed: int
    epochs: int
    batch_conversations: int
    pack_tokens: int
    rank: int = 0
    world: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch. One of them may hold fewer conversations than the others."""
        return -(-len(self.members) // self.batch_conversations)

    @property
    def total_steps(self) -> int:
        """Steps of all epochs."""
        return self.steps_per_epoch * self.epochs

    def steps(self, first: int = 0) -> Iterator[StepPlan]:
        """Yield the steps `first` .. total_steps-1."""
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
                mine = share_of_rank(chosen, self.tokens[chosen], self.rank, self.world)
                yield StepPlan(chosen, micro_batches(mine, self.tokens[mine], self.pack_tokens), epoch)
