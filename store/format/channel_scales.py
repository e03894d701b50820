"""The static scale of every channel of every tap, which int8 mode divides by, and its calibration."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftcache.store.common.errors import InputError, StoreError
from draftcache.store.common.files import hash_bytes
from draftcache.store.format.bf16 import states_to_float32


@dataclass(frozen=True)
class ChannelScales:
    """The scale of every channel of every tap."""

    scales: dict[int, NDArray[np.float32]]
    """By block number, [H] float32, every value above 0."""

    @property
    def hash(self) -> str:
        """xxh3-128 of the block numbers and the values."""
        pieces = [np.array([layer], "<i8").tobytes() + self._bytes(layer) for layer in sorted(self.scales)]
        return hash_bytes(*pieces)

    def _bytes(self, layer: int) -> bytes:
        return self.scales[layer].astype("<f4").tobytes()

    def to_json(self) -> dict[str, Any]:
        """Return `hash`, and under `float32` the base64 text of each block's little-endian float32 values."""
        values = {str(layer): base64.b64encode(self._bytes(layer)).decode() for layer in sorted(self.scales)}
        return {"hash": self.hash, "float32": values}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ChannelScales:
        """Read the result of `to_json`. Raises StoreError where the values do not hash to the recorded hash."""
        scales = cls(
            {
                int(layer): np.frombuffer(base64.b64decode(text), "<f4").astype(np.float32)
                for layer, text in value["float32"].items()
            }
        )
        if scales.hash != value["hash"]:
            raise StoreError(f"channel scales: expected values of hash {value['hash']}, found {scales.hash}")
        return scales


class Calibration:
    """Sums of squares per channel, over any number of blocks of rows. The root of their mean is the channel's scale."""

    def __init__(self, layers: Sequence[int], hidden_size: int) -> None:
        self._sums = {layer: np.zeros(hidden_size) for layer in layers}
        self._rows = dict.fromkeys(layers, 0)

    def add(self, layer: int, states: NDArray[Any]) -> None:
        """Count states [R, H] of one tap, which are bf16 bit patterns (uint16) or float32."""
        values = states_to_float32(states)
        self.add_sums(layer, np.square(values, dtype=np.float64).sum(axis=0), values.shape[0])

    def add_sums(self, layer: int, squares: NDArray[np.float64], rows: int) -> None:
        """Count sums of squares [H] float64 that were made over `rows` rows of one tap."""
        self._sums[layer] += squares
        self._rows[layer] += rows

    def finish(self) -> ChannelScales:
        """Return the scales. A channel that was zero throughout gets 1.

        Raises InputError where a tap has no rows or a sum is not finite.
        """
        scales = {}
        for layer, sums in self._sums.items():
            if not self._rows[layer] or not np.isfinite(sums).all():
                raise InputError(f"calibration of tap {layer}: expected finite states, found {self._rows[layer]} rows")
            rms = np.sqrt(sums / self._rows[layer]).astype(np.float32)
            scales[layer] = np.where(rms > 0, rms, np.float32(1))
        return ChannelScales(scales)
