"""Batches of conversations under a budget of tokens: similar lengths side by side, padded on the right."""

from __future__ import annotations

from collections.abc import Sequence

_LEAST_SHARE = 0.8
"""A conversation shorter than this share of the batch's longest starts a new batch: padding costs what tokens cost."""


def token_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """The conversations of each batch by their number in `lengths`, shortest first; a pure function of its arguments.

    A batch's size times its longest length is at most `batch_tokens`, except for a single conversation that is longer.
    The longest come last, so that a device has work while the host ends this shard and begins the next one.
    """
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], -number))
    batches: list[list[int]] = []
    for number in order:
        longest = lengths[batches[-1][0]] if batches else 0
        fits = batches and (len(batches[-1]) + 1) * longest <= batch_tokens
        if fits and lengths[number] >= _LEAST_SHARE * longest:
            batches[-1].append(number)
        else:
            batches.append([number])
    return [batch[::-1] for batch in reversed(batches)]
