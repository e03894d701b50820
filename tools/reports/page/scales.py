"""Axes of a chart: round ticks, positions, and numbers as text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """A linear map from the values `low` .. `high` to the places `first` .. `last` of a picture."""

    low: float
    high: float
    first: float
    last: float

    def __call__(self, value: float) -> float:
        """Return the place of a value."""
        return self.first + (value - self.low) / (self.high - self.low) * (self.last - self.first)


def round_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Return at most `most` + 1 round values from at most `low` to at least `high`, evenly spaced."""
    if not high > low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * unit for unit in (1, 2, 2.5, 5, 10) if power * unit >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Return the ticks as text, all with the decimals that their distance asks for; from 10,000 on in k, M or B."""
    largest = max(abs(tick) for tick in ticks)
    unit, sign = next(((unit, sign) for least, unit, sign in _UNITS if largest >= least), (1.0, ""))
    step = abs(ticks[1] - ticks[0]) / unit if len(ticks) > 1 else 1.0
    if 0 < largest < 1e-3:
        decimals = max(0, math.floor(math.log10(largest)) + _decimals(step))
        return ["0" if tick == 0 else f"{tick:.{decimals}e}" for tick in ticks]
    return ["0" if sign and tick == 0 else f"{tick / unit:.{_decimals(step)}f}{sign}" for tick in ticks]


_UNITS = ((1e9, 1e9, "B"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))


def _decimals(step: float) -> int:
    """Return the decimals that tell multiples of a step apart; steps of 2.5 need one more."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    scaled = step * 10.0**decimals
    return decimals + int(abs(round(scaled) - scaled) > 1e-6)
