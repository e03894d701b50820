"""Validity gates: engines have shipped all-zero and NaN captures that nobody noticed until acceptance was zero."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch

from store.errors import GateError

_WARM_UP = 16  # conversations before the band is trusted
_SIGMAS = 8.0
_LEAST_BAND = math.log(4.0)


@dataclass
class NormBand:
    """Running mean and variance of the log of a tap's rms, over conversations; restarts from commit records."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        """Count one conversation's log rms."""
        self.count += 1
        self.total += value
        self.squares += value * value

    def limits(self) -> tuple[float, float] | None:
        """Lowest and highest log rms that pass, or None before 16 conversations: 8 sigma, at least a factor of 4."""
        if self.count < _WARM_UP:
            return None
        mean = self.total / self.count
        sigma = math.sqrt(max(self.squares / self.count - mean * mean, 0.0))
        half = max(_SIGMAS * sigma, _LEAST_BAND)
        return mean - half, mean + half


@dataclass
class Gates:
    """Checks every conversation: finite, non-zero, taps apart, norms inside a running band."""

    bands: dict[int, NormBand] = field(default_factory=dict)

    def check(self, taps: dict[int, torch.Tensor], final: torch.Tensor) -> None:
        """Raise GateError saying which tap fails, what was expected and what was found; else extend the bands.

        `taps`: outputs [R, H] by block number; `final` [P, H]: states that the teacher was computed from.
        """
        norms = {}
        for layer, tap in taps.items():
            rms = _checked_rms(f"tap {layer}", tap)
            norms[layer] = math.log(rms)
            limits = self.bands.setdefault(layer, NormBand()).limits()
            if limits is not None and not limits[0] <= norms[layer] <= limits[1]:
                low, high = (math.exp(value) for value in limits)
                raise GateError(f"tap {layer}: expected rms between {low:.4g} and {high:.4g}, found {rms:.4g}")
        _checked_rms("final state", final)
        layers = sorted(taps)
        for first, second in itertools.pairwise(layers):
            if torch.equal(taps[first], taps[second]):
                raise GateError(f"taps {first} and {second}: expected different states, found equal ones")
        for layer, value in norms.items():
            self.bands[layer].add(value)

    def to_json(self) -> dict[str, Any]:
        """State for a shard's commit record."""
        return {str(layer): [band.count, band.total, band.squares] for layer, band in self.bands.items()}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Gates:
        """State from a shard's commit record."""
        return cls(bands={int(layer): NormBand(*numbers) for layer, numbers in value.items()})


def _checked_rms(name: str, states: torch.Tensor) -> float:
    rms = float(states.float().pow(2).mean().sqrt())
    if not math.isfinite(rms):
        raise GateError(f"{name}: expected finite values, found NaN or infinity")
    if rms == 0.0 or bool((states == 0).all(dim=-1).any()):
        raise GateError(f"{name}: expected non-zero rows, found a row of zeros")
    return rms
