"""How one tap's states [R, H] are stored: as bf16 bits, two byte planes, or quantised with scales.

| mode     | arrays                                                | bytes per state | exact            |
|----------|-------------------------------------------------------|-----------------|------------------|
| float32  | tap_<l> float32 [R, H]                                | 4               | yes              |
| bf16     | tap_<l> uint16 [R, H], bit patterns                   | 2               | yes, of bf16     |
| lossless | tap_<l>_hi uint8 [R, H], zstd; tap_<l>_lo uint8       | about 1.4       | yes, of bf16     |
| int8     | tap_<l>_q int8 [R, H]; tap_<l>_scale f16 [R, H / 128] | 1.016           | error about .007 |
| fp8      | tap_<l>_q uint8 [R, H]; tap_<l>_scale float32 [R]     | 1.001           | error about .027 |

The error is the rms of the difference after dividing by each channel's rms. States come and go as bf16 bit patterns
(uint16), in float32 mode as float32. This module is the numpy form; `torch_codecs` gives the same bits on any device.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from draftcache.store.common.errors import InputError, StoreError
from draftcache.store.common.files import hash_bytes
from draftcache.store.format.schema import ROWS_AXIS, ArraySpec, tap_name

INT8_BLOCK = 128
INT8_MAX = np.float32(127)
SCALE_MIN = np.float32(2.0**-24)
SCALE_MAX = np.float32(65504)
"""Smallest and largest positive float16: a block's scale stays between them."""
INT8_LIMIT = SCALE_MAX * INT8_MAX
"""The largest multiple of its channel's rms that a state can be stored as: beyond 8 million, it is cut to it."""
FP8_MAX = np.float32(448)

States = NDArray[Any]
Parts = Mapping[str, NDArray[Any]]


class TapCodec(Protocol):
    """Between states and stored arrays."""

    @property
    def mode(self) -> str:
        """Its name in `MODES`."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Block numbers of the taps."""

    def specs(self, layer: int) -> dict[str, ArraySpec]:
        """The arrays that hold one tap, by name."""

    def encode(self, layer: int, states: States) -> dict[str, NDArray[Any]]:
        """Arrays of states [R, H]. Raises InputError for another dtype or, where quantised, non-finite values."""

    def decode(self, layer: int, parts: Parts, out: States | None = None) -> States:
        """States [R, H] of the arrays, into `out` where it is given."""


@dataclass(frozen=True)
class _Codec:
    layers: tuple[int, ...]
    hidden_size: int
    channel_scales: ChannelScales | None = None

    def _spec(self, dtype: str, *inner: int, compress: bool = False) -> ArraySpec:
        return ArraySpec(axis=ROWS_AXIS, dtype=dtype, inner=inner, compress=compress)


class Float32Codec(_Codec):
    """Float32 as it is."""

    mode = "float32"
    dtype: ClassVar[type[Any]] = np.float32

    def specs(self, layer: int) -> dict[str, ArraySpec]:
        """See TapCodec."""
        return {tap_name(layer): self._spec(np.dtype(self.dtype).name, self.hidden_size)}

    def encode(self, layer: int, states: States) -> dict[str, NDArray[Any]]:
        """See TapCodec."""
        return {tap_name(layer): require_dtype(states, self.dtype)}

    def decode(self, layer: int, parts: Parts, out: States | None = None) -> States:
        """See TapCodec."""
        return _into(parts[tap_name(layer)], out)


class Bf16Codec(Float32Codec):
    """bf16 bit patterns as they are."""

    mode = "bf16"
    dtype = np.uint16


class LosslessCodec(_Codec):
    """Sign and exponent in one plane, which zstd more than halves; the mantissa, incompressible, in another."""

    mode = "lossless"

    def specs(self, layer: int) -> dict[str, ArraySpec]:
        """See TapCodec."""
        name = tap_name(layer)
        return {
            f"{name}_hi": self._spec("uint8", self.hidden_size, compress=True),
            f"{name}_lo": self._spec("uint8", self.hidden_size),
        }

    def encode(self, layer: int, states: States) -> dict[str, NDArray[Any]]:
        """See TapCodec."""
        planes = np.ascontiguousarray(require_dtype(states, np.uint16), "<u2").view(np.uint8)
        name = tap_name(layer)
        return {
            f"{name}_hi": np.ascontiguousarray(planes[:, 1::2]),
            f"{name}_lo": np.ascontiguousarray(planes[:, ::2]),
        }

    def decode(self, layer: int, parts: Parts, out: States | None = None) -> States:
        """See TapCodec."""
        high, low = parts[f"{tap_name(layer)}_hi"], parts[f"{tap_name(layer)}_lo"]
        out = np.empty(high.shape, "<u2") if out is None else out
        np.left_shift(high, 8, out=out, dtype=np.uint16)
        np.bitwise_or(out, low, out=out)
        return out


class Int8Codec(_Codec):
    """Each channel over its static scale, then absmax per block of 128 channels.

    The static scales (rms of the channel, from one calibration pass) make channels alike, so that a massive one
    does not take its whole block's resolution. Non-finite states are refused.
    """

    mode = "int8"

    @property
    def blocks(self) -> int:
        """Blocks of 128 channels, the last one shorter where H is no multiple."""
        return -(-self.hidden_size // INT8_BLOCK)

    def scales(self, layer: int) -> NDArray[np.float32]:
        """[H] float32."""
        if self.channel_scales is None:
            raise InputError("int8: expected calibrated channel scales, found none")
        return self.channel_scales.scales[layer]

    def specs(self, layer: int) -> dict[str, ArraySpec]:
        """See TapCodec."""
        name = tap_name(layer)
        return {
            f"{name}_q": self._spec("int8", self.hidden_size),
            f"{name}_scale": self._spec("float16", self.blocks),
        }

    def encode(self, layer: int, states: States) -> dict[str, NDArray[Any]]:
        """See TapCodec. A block's scale is absmax / 127, kept within float16's range; 0 for a block of zeros."""
        with np.errstate(over="ignore"):
            values = np.clip(require_finite(states) / self.scales(layer), -INT8_LIMIT, INT8_LIMIT)
        edges = np.arange(0, self.hidden_size, INT8_BLOCK)
        largest = np.maximum.reduceat(np.abs(values), edges, axis=1)
        scale = np.clip(largest / INT8_MAX, SCALE_MIN, SCALE_MAX).astype(np.float16)
        scale[largest == 0] = 0
        divisor = np.where(scale == 0, np.float32(1), scale.astype(np.float32))
        quantised = np.rint(values / _widen(divisor, self.hidden_size))
        name = tap_name(layer)
        return {f"{name}_q": np.clip(quantised, -INT8_MAX, INT8_MAX).astype(np.int8), f"{name}_scale": scale}

    def decode(self, layer: int, parts: Parts, out: States | None = None) -> States:
        """See TapCodec."""
        name = tap_name(layer)
        scale = _widen(parts[f"{name}_scale"].astype(np.float32), self.hidden_size)
        return _into(float32_to_bf16(parts[f"{name}_q"].astype(np.float32) * scale * self.scales(layer)), out)


class Fp8Codec(_Codec):
    """e4m3fn, one scale per token and tap: absmax / 448. Non-finite states are refused."""

    mode = "fp8"

    def specs(self, layer: int) -> dict[str, ArraySpec]:
        """See TapCodec."""
        name = tap_name(layer)
        return {f"{name}_q": self._spec("uint8", self.hidden_size), f"{name}_scale": self._spec("float32")}

    def encode(self, layer: int, states: States) -> dict[str, NDArray[Any]]:
        """See TapCodec."""
        values = require_finite(states)
        scale = np.abs(values).max(axis=1, initial=0) / FP8_MAX
        divisor = np.where(scale == 0, np.float32(1), scale)
        # Where the scale is subnormal it is too coarse for the quotient to stay below 448.
        quantised = np.clip(values / divisor[:, None], -FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn)
        name = tap_name(layer)
        return {f"{name}_q": quantised.view(np.uint8), f"{name}_scale": scale}

    def decode(self, layer: int, parts: Parts, out: States | None = None) -> States:
        """See TapCodec."""
        name = tap_name(layer)
        values = parts[f"{name}_q"].view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        return _into(float32_to_bf16(values * parts[f"{name}_scale"][:, None]), out)


_CODECS: dict[str, Callable[..., TapCodec]] = {
    codec.mode: codec for codec in (Bf16Codec, LosslessCodec, Int8Codec, Fp8Codec, Float32Codec)
}
MODES = tuple(_CODECS)
LOSSY_MODES = (Int8Codec.mode, Fp8Codec.mode)


def tap_codec(
    mode: str, *, layers: Sequence[int], hidden_size: int, channel_scales: ChannelScales | None = None
) -> TapCodec:
    """The codec of a mode. Raises InputError for an unknown mode, or int8's scales missing or of another shape."""
    if mode not in _CODECS:
        raise InputError(f"mode: expected one of {list(MODES)}, found {mode!r}")
    if mode == Int8Codec.mode:
        found = {} if channel_scales is None else {layer: item.shape for layer, item in channel_scales.scales.items()}
        if found != dict.fromkeys(layers, (hidden_size,)):
            raise InputError(f"int8: expected scales of {hidden_size} channels for taps {list(layers)}, found {found}")
    return _CODECS[mode](tuple(layers), hidden_size, channel_scales)


@dataclass(frozen=True)
class ChannelScales:
    """The scale of every channel of every tap: {layer: [H] float32, above 0}."""

    scales: dict[int, NDArray[np.float32]]

    @property
    def hash(self) -> str:
        """xxh3-128 of the layers' numbers and values."""
        pieces = [np.array([layer], "<i8").tobytes() + self._bytes(layer) for layer in sorted(self.scales)]
        return hash_bytes(*pieces)

    def _bytes(self, layer: int) -> bytes:
        return self.scales[layer].astype("<f4").tobytes()

    def to_json(self) -> dict[str, Any]:
        """`hash`, and per layer base64 of little-endian float32."""
        values = {str(layer): base64.b64encode(self._bytes(layer)).decode() for layer in sorted(self.scales)}
        return {"hash": self.hash, "float32": values}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ChannelScales:
        """Read what `to_json` made. Raises StoreError where the values do not hash to what they should."""
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
    """Sums of squares per channel, over any number of blocks of rows: their root mean is the channel's scale."""

    def __init__(self, layers: Sequence[int], hidden_size: int) -> None:
        self._sums = {layer: np.zeros(hidden_size) for layer in layers}
        self._rows = dict.fromkeys(layers, 0)

    def add(self, layer: int, states: States) -> None:
        """States [R, H], bf16 bit patterns or float32."""
        values = states if states.dtype == np.float32 else bf16_to_float32(states)
        self.add_sums(layer, np.square(values, dtype=np.float64).sum(axis=0), values.shape[0])

    def add_sums(self, layer: int, squares: NDArray[np.float64], rows: int) -> None:
        """Sums of squares [H] over `rows` rows."""
        self._sums[layer] += squares
        self._rows[layer] += rows

    def finish(self) -> ChannelScales:
        """A channel that was zero throughout gets 1. Raises InputError without rows, or for a non-finite sum."""
        scales = {}
        for layer, sums in self._sums.items():
            if not self._rows[layer] or not np.isfinite(sums).all():
                raise InputError(f"calibration of tap {layer}: expected finite states, found {self._rows[layer]} rows")
            rms = np.sqrt(sums / self._rows[layer]).astype(np.float32)
            scales[layer] = np.where(rms > 0, rms, np.float32(1))
        return ChannelScales(scales)


def bf16_to_float32(bits: NDArray[Any]) -> NDArray[np.float32]:
    """Values of bf16 bit patterns, exactly."""
    values: NDArray[np.float32] = np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)
    return values


def float32_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """bf16 bit patterns, rounded to nearest, ties to even."""
    bits: NDArray[np.uint16] = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    return bits


def require_dtype(states: States, dtype: type[Any]) -> States:
    """The states, or InputError where they are of another dtype."""
    if states.dtype != dtype:
        raise InputError(f"expected states of {np.dtype(dtype)}, found {states.dtype}")
    return states


def require_finite(states: States) -> NDArray[np.float32]:
    """Float32 values of bf16 bits, or InputError where one is not finite: no scale could hold it."""
    values = bf16_to_float32(require_dtype(states, np.uint16))
    if not np.isfinite(values).all():
        raise InputError("expected finite states, found NaN or infinity; a lossy mode can not store them")
    return values


def _widen(blocks: NDArray[np.float32], hidden_size: int) -> NDArray[np.float32]:
    return np.repeat(blocks, INT8_BLOCK, axis=1)[:, :hidden_size]


def _into(states: States, out: States | None) -> States:
    if out is None:
        return states
    out[...] = states
    return out
