"""The band that the norms of a tap stay in. Capture's gates judge by it, and verify judges the stored rows by it again.

A conversation's norm is the mean over its rows of the logarithm of a row's rms, not of the squares: in trained models
a few rows, the first token's above all, are up to 150 times the others. Pooled squares then tell how long a
conversation is: in the middle of SmolLM2-135M their root falls by a factor of 11 from 30 tokens to 4,000, where the
mean of logarithms moves by 1.26. A band of 36 conversations of 1,200 to 3,500 tokens would have set aside every
conversation of 30 to 100 tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from draftcache.store.common.errors import StoreError
from draftcache.store.common.files import hash_json

_LEAST_CONVERSATIONS = 16  # fewer conversations say nothing about the spread
_SIGMAS = 8.0
_LEAST_BAND = math.log(4.0)


@dataclass
class NormBand:
    """The mean and variance of one tap's log rms over conversations, held as sums."""

    count: int = 0
    """Number of conversations."""
    total: float = 0.0
    """Sum of their log rms."""
    squares: float = 0.0
    """Sum of the squares of their log rms."""

    def add(self, value: float) -> None:
        """Count one conversation's log rms."""
        self.count += 1
        self.total += value
        self.squares += value * value

    def join(self, other: NormBand) -> None:
        """Count the conversations of another band too."""
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    def limits(self) -> tuple[float, float] | None:
        """Return the lowest and the highest log rms that pass, or None below 16 conversations.

        The band is the mean plus or minus 8 sigma, and at least a factor of 4 each way.
        """
        if self.count < _LEAST_CONVERSATIONS:
            return None
        mean = self.total / self.count
        sigma = math.sqrt(max(self.squares / self.count - mean * mean, 0.0))
        half = max(_SIGMAS * sigma, _LEAST_BAND)
        return mean - half, mean + half

    def problem(self, value: float, slack: float = 0.0) -> str | None:
        """Say what is wrong with a conversation's log rms.

        The result is None where `value` lies in the band, which `slack` (of log rms) widens on both sides.
        """
        limits = self.limits()
        if limits is None or limits[0] - slack <= value <= limits[1] + slack:
            return None
        low, high = (math.exp(limit) for limit in (limits[0] - slack, limits[1] + slack))
        return f"expected a typical rms of its rows between {low:.4g} and {high:.4g}, found {math.exp(value):.4g}"

    def to_json(self) -> list[float]:
        """Return the count, the sum and the sum of squares."""
        return [self.count, self.total, self.squares]


def bands_to_json(bands: Mapping[int, NormBand]) -> dict[str, Any]:
    """Return `hash`, and per block the count, sum and sum of squares of the conversations' log rms."""
    values = {str(layer): bands[layer].to_json() for layer in sorted(bands)}
    return {"hash": hash_json(values), "mean_log_rms": values}


def bands_from_json(value: Mapping[str, Any]) -> dict[int, NormBand]:
    """Read the result of `bands_to_json`. Raises StoreError where the values do not hash to the recorded hash."""
    found = hash_json(value["mean_log_rms"])
    if found != value["hash"]:
        raise StoreError(f"norm bands: expected values of hash {value['hash']}, found {found}")
    return {int(layer): NormBand(*numbers) for layer, numbers in value["mean_log_rms"].items()}
