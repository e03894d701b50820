"""Gates that every conversation's states have to pass before they are stored.

Inference engines have shipped captures of zeros and of NaN that nobody noticed until acceptance was zero. The states of
a conversation must be finite, without rows of zeros, different from tap to tap, and their norms inside the store's
bands. The device only adds up a few numbers (`gate_statistics`); they are judged once they have arrived on the host, so
that the device never waits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from draftcache.store.common.errors import GateError
from draftcache.store.format.norm_band import NormBand

_TINY = torch.finfo(torch.float32).tiny


def gate_statistics(taps: Mapping[int, torch.Tensor], final: torch.Tensor) -> torch.Tensor:
    """Sums that the gates judge by, [len(taps) + 1, 4] float32 on the taps' device, without waiting for the device.

    `taps`: outputs [R, H] by block number; `final` [P, H]: states that the teacher was computed from. Row i is of the
    i-th tap in ascending order, the last row is of `final`. The columns are the number of states, the sum of the
    logarithms of their rms, the number of states that are all zero, and the number that differ from the tap before.
    Statistics of a conversation's pieces add up to the statistics of the conversation; NaN and infinity stay in the
    second column.
    """
    states = [taps[layer] for layer in sorted(taps)]
    different = [_count((second != first).any(dim=-1)) for first, second in itertools.pairwise(states)]
    zero = final.new_zeros((), dtype=torch.float32)
    columns = zip([*states, final], [zero, *different, zero], strict=True)
    return torch.stack([torch.stack([*_row(item), differ]) for item, differ in columns])


def _row(states: torch.Tensor) -> list[torch.Tensor]:
    norms = torch.linalg.vector_norm(states, dim=-1, dtype=torch.float32)
    largest = torch.linalg.vector_norm(states, ord=math.inf, dim=-1)  # a norm could be 0 by underflow
    rows = norms.new_full((), float(states.shape[0]))
    logs = norms.clamp(min=_TINY).log().sum() - rows * (math.log(states.shape[-1]) / 2)
    return [rows, logs, _count(largest == 0)]


def _count(flags: torch.Tensor) -> torch.Tensor:
    return flags.sum(dtype=torch.float32)


class Gates:
    """Judges conversations by bands that were fixed before the first shard, so that their order does not matter.

    Without bands the norms are not judged, only counted.
    """

    def __init__(self, layers: Sequence[int], bands: Mapping[int, NormBand] | None = None) -> None:
        self._layers = sorted(layers)
        self._bands = bands or {}
        self.norms = {layer: NormBand() for layer in self._layers}
        """By block number, the log rms of the conversations that passed."""

    def check(self, taps: Mapping[int, torch.Tensor], final: torch.Tensor) -> None:
        """Compute `gate_statistics` and `judge` them."""
        self.judge(gate_statistics(taps, final).cpu())

    def judge(self, statistics: torch.Tensor) -> None:
        """Judge the `gate_statistics` of one conversation, on the CPU, and count its norms if it passes.

        Raises GateError that says which tap fails, what was expected and what was found.
        """
        *taps, final = statistics.tolist()
        norms = {}
        for layer, row in zip(self._layers, taps, strict=True):
            value = _checked_log_rms(f"tap {layer}", *row[:3])
            if value is None:
                continue
            norms[layer] = value
            if layer in self._bands and (problem := self._bands[layer].problem(value)):
                raise GateError(f"tap {layer}: {problem}")
        _checked_log_rms("final state", *final[:3])
        for (first, _), (second, row) in itertools.pairwise(zip(self._layers, taps, strict=True)):
            if row[0] and not row[3]:
                raise GateError(f"taps {first} and {second}: expected different states, found equal ones")
        for layer, value in norms.items():
            self.norms[layer].add(value)

    def norms_json(self) -> dict[str, Any]:
        """Per block the count, sum and sum of squares of log rms, for a shard's commit record."""
        return {str(layer): band.to_json() for layer, band in self.norms.items()}


def _checked_log_rms(name: str, rows: float, logs: float, zero_rows: float) -> float | None:
    """The mean log rms over rows, or None without rows. Raises GateError for rows of zeros, NaN and infinity."""
    if not rows:
        return None
    if zero_rows:
        raise GateError(f"{name}: expected non-zero rows, found a row of zeros")
    if not math.isfinite(logs):
        raise GateError(f"{name}: expected finite values, found NaN or infinity")
    return logs / rows
