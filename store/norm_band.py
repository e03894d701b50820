"""The band that the norms of a tap stay in: capture judges by it, and verify judges what was stored by it again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from store.errors import StoreError
from store.files import hash_json

_LEAST_CONVERSATIONS = 16  # fewer say nothing about the spread
_SIGMAS = 8.0
_LEAST_BAND = math.log(4.0)


@dataclass
class NormBand:
    """Mean and variance of the log of a tap's rms, over conversations."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        """Count one conversation's log rms."""
        self.count += 1
        self.total += value
        self.squares += value * value

    def join(self, other: NormBand) -> None:
        """Count another one's conversations too."""
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    def limits(self) -> tuple[float, float] | None:
        """Lowest and highest log rms that pass, or None below 16 conversations: 8 sigma, at least a factor of 4."""
        if self.count < _LEAST_CONVERSATIONS:
            return None
        mean = self.total / self.count
        sigma = math.sqrt(max(self.squares / self.count - mean * mean, 0.0))
        half = max(_SIGMAS * sigma, _LEAST_BAND)
        return mean - half, mean + half

    def to_json(self) -> list[float]:
        """Count, sum, sum of squares."""
        return [self.count, self.total, self.squares]


def bands_to_json(bands: Mapping[int, NormBand]) -> dict[str, Any]:
    """`hash`, and per layer the count, sum and sum of squares of log rms."""
    values = {str(layer): bands[layer].to_json() for layer in sorted(bands)}
    return {"hash": hash_json(values), "log_rms": values}


def bands_from_json(value: Mapping[str, Any]) -> dict[int, NormBand]:
    """Read what `bands_to_json` made. Raises StoreError where the values do not hash to what they should."""
    found = hash_json(value["log_rms"])
    if found != value["hash"]:
        raise StoreError(f"norm bands: expected values of hash {value['hash']}, found {found}")
    return {int(layer): NormBand(*numbers) for layer, numbers in value["log_rms"].items()}
