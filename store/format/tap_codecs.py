"""How one tap's states [R, H] are stored: as bf16 bits, as two byte planes, or quantised with scales.

| mode     | arrays                                                | bytes per state | exact            |
|----------|-------------------------------------------------------|-----------------|------------------|
| float32  | tap_<l> float32 [R, H]                                | 4               | yes              |
| bf16     | tap_<l> uint16 [R, H], bit patterns                   | 2               | yes, of bf16     |
| lossless | tap_<l>_hi uint8 [R, H], zstd; tap_<l>_lo uint8       | about 1.4       | yes, of bf16     |
| int8     | tap_<l>_q int8 [R, H]; tap_<l>_scale f16 [R, H / 128] | 1.016           | error about .007 |
| fp8      | tap_<l>_q uint8 [R, H]; tap_<l>_scale float32 [R]     | 1.001           | error about .027 |

The error is the rms of the difference after dividing by each channel's rms. Codecs take and give states as bf16 bit
patterns (uint16), in float32 mode as float32. This module is the numpy form; `torch_codecs` gives the same bits on any
device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from draftcache.store.common.errors import InputError
from draftcache.store.format.array_spec import ROWS_AXIS, ArraySpec, tap_name
from draftcache.store.format.bf16 import bf16_to_float32, float32_to_bf16
from draftcache.store.format.channel_scales import ChannelScales

INT8_BLOCK = 128
INT8_MAX = np.float32(127)
SCALE_MIN = np.float32(2.0**-24)
SCALE_MAX = np.float32(65504)
"""The smallest and the largest positive float16: the scale of a block stays between them."""
INT8_LIMIT = SCALE_MAX * INT8_MAX
"""The largest multiple of its channel's rms that a state can be stored as. Beyond it, 8 million, states are clipped."""
FP8_MAX = np.float32(448)

States = NDArray[Any]
Parts = Mapping[str, NDArray[Any]]


class TapCodec(Protocol):
    """Turns a tap's states into the arrays that are stored for them, and back."""

    @property
    def mode(self) -> str:
        """The codec's name in `MODES`."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Block numbers of the taps."""

    def specs(self, layer: int) -> dict[str, ArraySpec]:
        """Return the description of each array that holds one tap, by name."""

    def encode(self, layer: int, states: States) -> dict[str, NDArray[Any]]:
        """Return the arrays, by name, that hold states [R, H].

        Raises InputError for states of another dtype or, where the mode quantises, for non-finite ones.
        """

    def decode(self, layer: int, parts: Parts, out: States | None = None) -> States:
        """Return the states [R, H] that the arrays `parts` hold, written into `out` where it is given."""


@dataclass(frozen=True)
class _Codec:
    layers: tuple[int, ...]
    hidden_size: int
    channel_scales: ChannelScales | None = None

    def _spec(self, dtype: str, *inner: int, compress: bool = False) -> ArraySpec:
        return ArraySpec(axis=ROWS_AXIS, dtype=dtype, inner=inner, compress=compress)


class Float32Codec(_Codec):
    """Stores float32 states as they are. Implements `TapCodec`."""

    mode = "float32"
    dtype: ClassVar[type[Any]] = np.float32

    def specs(self, layer: int) -> dict[str, ArraySpec]:
        return {tap_name(layer): self._spec(np.dtype(self.dtype).name, self.hidden_size)}

    def encode(self, layer: int, states: States) -> dict[str, NDArray[Any]]:
        return {tap_name(layer): require_dtype(states, self.dtype)}

    def decode(self, layer: int, parts: Parts, out: States | None = None) -> States:
        return _into(parts[tap_name(layer)], out)


class Bf16Codec(Float32Codec):
    """Stores bf16 bit patterns as they are. Implements `TapCodec`."""

    mode = "bf16"
    dtype = np.uint16


class LosslessCodec(_Codec):
    """Stores the two bytes of bf16 in two planes. Implements `TapCodec`.

    The high plane holds the sign and most of the exponent, and zstd more than halves it. The low plane, the rest of the
    exponent and the mantissa, is incompressible.
    """

    mode = "lossless"

    def specs(self, layer: int) -> dict[str, ArraySpec]:
        name = tap_name(layer)
        return {
            f"{name}_hi": self._spec("uint8", self.hidden_size, compress=True),
            f"{name}_lo": self._spec("uint8", self.hidden_size),
        }

    def encode(self, layer: int, states: States) -> dict[str, NDArray[Any]]:
        planes = np.ascontiguousarray(require_dtype(states, np.uint16), "<u2").view(np.uint8)
        name = tap_name(layer)
        return {
            f"{name}_hi": np.ascontiguousarray(planes[:, 1::2]),
            f"{name}_lo": np.ascontiguousarray(planes[:, ::2]),
        }

    def decode(self, layer: int, parts: Parts, out: States | None = None) -> States:
        high, low = parts[f"{tap_name(layer)}_hi"], parts[f"{tap_name(layer)}_lo"]
        out = np.empty(high.shape, "<u2") if out is None else out
        np.left_shift(high, 8, out=out, dtype=np.uint16)
        np.bitwise_or(out, low, out=out)
        return out


class Int8Codec(_Codec):
    """Divides each channel by its static scale, then quantises blocks of 128 channels. Implements `TapCodec`.

    The static scales (each channel's rms, from one calibration pass) make channels alike, so that a massive one does
    not take its whole block's resolution. Non-finite states are refused.
    """

    mode = "int8"

    @property
    def blocks(self) -> int:
        """Number of blocks of 128 channels. The last one is shorter where H is no multiple of 128."""
        return -(-self.hidden_size // INT8_BLOCK)

    def scales(self, layer: int) -> NDArray[np.float32]:
        """Return the static scales [H] float32 of one tap. Raises InputError where the codec was made without any."""
        if self.channel_scales is None:
            raise InputError("int8: expected calibrated channel scales, found none")
        return self.channel_scales.scales[layer]

    def specs(self, layer: int) -> dict[str, ArraySpec]:
        name = tap_name(layer)
        return {
            f"{name}_q": self._spec("int8", self.hidden_size),
            f"{name}_scale": self._spec("float16", self.blocks),
        }

    def encode(self, layer: int, states: States) -> dict[str, NDArray[Any]]:
        """Quantise; a block's scale is absmax / 127, kept within float16's range, and 0 for a block of zeros."""
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
        name = tap_name(layer)
        scale = _widen(parts[f"{name}_scale"].astype(np.float32), self.hidden_size)
        return _into(float32_to_bf16(parts[f"{name}_q"].astype(np.float32) * scale * self.scales(layer)), out)


class Fp8Codec(_Codec):
    """Quantises to e4m3fn with one scale per row and tap, which is absmax / 448. Implements `TapCodec`.

    Non-finite states are refused.
    """

    mode = "fp8"

    def specs(self, layer: int) -> dict[str, ArraySpec]:
        name = tap_name(layer)
        return {f"{name}_q": self._spec("uint8", self.hidden_size), f"{name}_scale": self._spec("float32")}

    def encode(self, layer: int, states: States) -> dict[str, NDArray[Any]]:
        values = require_finite(states)
        scale = np.abs(values).max(axis=1, initial=0) / FP8_MAX
        divisor = np.where(scale == 0, np.float32(1), scale)
        # Where the scale is subnormal it is too coarse for the quotient to stay below 448.
        quantised = np.clip(values / divisor[:, None], -FP8_MAX, FP8_MAX).astype(ml_dtypes.float8_e4m3fn)
        name = tap_name(layer)
        return {f"{name}_q": quantised.view(np.uint8), f"{name}_scale": scale}

    def decode(self, layer: int, parts: Parts, out: States | None = None) -> States:
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
    """Return the codec of a mode for the taps of blocks `layers`, each of `hidden_size` channels.

    `channel_scales` is needed by int8 only. Raises InputError for an unknown mode, and where the scales of int8 are
    missing or do not fit the taps.
    """
    if mode not in _CODECS:
        raise InputError(f"mode: expected one of {list(MODES)}, found {mode!r}")
    if mode == Int8Codec.mode:
        found = {} if channel_scales is None else {layer: item.shape for layer, item in channel_scales.scales.items()}
        if found != dict.fromkeys(layers, (hidden_size,)):
            raise InputError(f"int8: expected scales of {hidden_size} channels for taps {list(layers)}, found {found}")
    return _CODECS[mode](tuple(layers), hidden_size, channel_scales)


def require_dtype(states: States, dtype: type[Any]) -> States:
    """Return the states. Raises InputError where they are of another dtype."""
    if states.dtype != dtype:
        raise InputError(f"expected states of {np.dtype(dtype)}, found {states.dtype}")
    return states


def require_finite(states: States) -> NDArray[np.float32]:
    """Return the values of bf16 bit patterns as float32.

    Raises InputError for states of another dtype, or where one is not finite: no scale could hold it.
    """
    values = bf16_to_float32(require_dtype(states, np.uint16))
    if not np.isfinite(values).all():
        raise InputError("expected finite states, found NaN or infinity; a lossy mode can not store them")
    return values


def _widen(blocks: NDArray[np.float32], hidden_size: int) -> NDArray[np.float32]:
    """Repeat values per block [R, H / 128] for each of the block's channels: [R, H]."""
    return np.repeat(blocks, INT8_BLOCK, axis=1)[:, :hidden_size]


def _into(states: States, out: States | None) -> States:
    if out is None:
        return states
    out[...] = states
    return out
