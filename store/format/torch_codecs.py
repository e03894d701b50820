"""The codecs of `tap_codecs` on torch tensors: they give the same bits, on the device where the states are.

This is the one module of the store's format that needs torch. Capture splits and quantises on the GPU before anything
crosses the bus, and training merges on the GPU after the stored arrays have crossed it. Divisions are by tensors, never
by Python numbers: on CUDA, torch turns a division by a number into a product with its reciprocal, which rounds
differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch

from draftcache.store.common.errors import InputError
from draftcache.store.format.array_spec import tap_name
from draftcache.store.format.channel_scales import Calibration
from draftcache.store.format.tap_codecs import (
    FP8_MAX,
    INT8_BLOCK,
    INT8_LIMIT,
    INT8_MAX,
    LOSSY_MODES,
    SCALE_MAX,
    SCALE_MIN,
    Int8Codec,
    TapCodec,
)

Tensors = dict[str, torch.Tensor]


def encode(codec: TapCodec, layer: int, states: torch.Tensor, *, require_finite: bool = True) -> Tensors:
    """Return the arrays, by name and on the states' device, that hold states [R, H] of any float dtype.

    Raises InputError for non-finite states where the codec quantises. Without `require_finite` the states are not
    checked, so that the device is not waited for, and the caller must throw away the arrays of non-finite states.
    """
    if codec.mode == "float32":
        return {tap_name(layer): states.float()}
    if require_finite and codec.mode in LOSSY_MODES and not bool(torch.isfinite(states).all()):
        raise InputError("expected finite states, found NaN or infinity; a lossy mode can not store them")
    return _ENCODE[codec.mode](codec, layer, states.to(torch.bfloat16).contiguous())


def decode(codec: TapCodec, layer: int, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the states [R, H] that stored arrays hold, bf16 (float32 in that mode), on the arrays' device."""
    return _DECODE[codec.mode](codec, layer, parts)


def add_squares(calibration: Calibration, layer: int, states: torch.Tensor) -> None:
    """Count states [R, H] of any float dtype into a calibration. Only the sums [H] leave the device."""
    squares = states.double().square().sum(dim=0)
    calibration.add_sums(layer, squares.cpu().numpy(), states.shape[0])


def _encode_bf16(_codec: TapCodec, layer: int, states: torch.Tensor) -> Tensors:
    return {tap_name(layer): states.view(torch.uint16)}


def _encode_lossless(_codec: TapCodec, layer: int, states: torch.Tensor) -> Tensors:
    planes = states.reshape(-1).view(torch.uint8).view(*states.shape, 2)
    name = tap_name(layer)
    return {f"{name}_hi": planes[..., 1].contiguous(), f"{name}_lo": planes[..., 0].contiguous()}


def _encode_int8(codec: TapCodec, layer: int, states: torch.Tensor) -> Tensors:
    values = states.float() / _channel_scales(codec, layer, states.device)
    values = values.clamp(-float(INT8_LIMIT), float(INT8_LIMIT))
    rows, width = values.shape
    padding = -width % INT8_BLOCK
    blocks = torch.nn.functional.pad(values, (0, padding)).view(rows, (width + padding) // INT8_BLOCK, INT8_BLOCK)
    largest = blocks.abs().amax(dim=2)
    scale = (largest / _constant(INT8_MAX, states)).clamp(float(SCALE_MIN), float(SCALE_MAX)).half()
    scale = torch.where(largest == 0, torch.zeros_like(scale), scale)
    divisor = torch.where(scale == 0, torch.ones_like(largest), scale.float())
    quantised = (blocks / divisor[:, :, None]).round().clamp(-float(INT8_MAX), float(INT8_MAX))
    name = tap_name(layer)
    return {
        f"{name}_q": quantised.to(torch.int8).view(rows, width + padding)[:, :width].contiguous(),
        f"{name}_scale": scale,
    }


def _encode_fp8(_codec: TapCodec, layer: int, states: torch.Tensor) -> Tensors:
    values = states.float()
    scale = values.abs().amax(dim=1) / _constant(FP8_MAX, states)
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale)
    quantised = (values / divisor[:, None]).clamp(-float(FP8_MAX), float(FP8_MAX)).to(torch.float8_e4m3fn)
    name = tap_name(layer)
    return {f"{name}_q": quantised.view(torch.uint8), f"{name}_scale": scale}


def _decode_plain(_codec: TapCodec, layer: int, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    stored = parts[tap_name(layer)]
    return stored if stored.dtype == torch.float32 else stored.view(torch.bfloat16)


def _decode_lossless(_codec: TapCodec, layer: int, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    high, low = parts[f"{tap_name(layer)}_hi"], parts[f"{tap_name(layer)}_lo"]
    return torch.stack((low, high), dim=-1).view(torch.bfloat16).squeeze(-1)


def _decode_int8(codec: TapCodec, layer: int, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    quantised, scale = parts[f"{tap_name(layer)}_q"], parts[f"{tap_name(layer)}_scale"]
    wide = scale.float().repeat_interleave(INT8_BLOCK, dim=1)[:, : quantised.shape[1]]
    return (quantised.float() * wide * _channel_scales(codec, layer, quantised.device)).to(torch.bfloat16)


def _decode_fp8(_codec: TapCodec, layer: int, parts: Mapping[str, torch.Tensor]) -> torch.Tensor:
    quantised, scale = parts[f"{tap_name(layer)}_q"], parts[f"{tap_name(layer)}_scale"]
    return (quantised.view(torch.float8_e4m3fn).float() * scale[:, None]).to(torch.bfloat16)


_ENCODE: dict[str, Callable[[TapCodec, int, torch.Tensor], Tensors]] = {
    "bf16": _encode_bf16,
    "lossless": _encode_lossless,
    "int8": _encode_int8,
    "fp8": _encode_fp8,
}
_DECODE: dict[str, Callable[[TapCodec, int, Mapping[str, torch.Tensor]], torch.Tensor]] = {
    "float32": _decode_plain,
    "bf16": _decode_plain,
    "lossless": _decode_lossless,
    "int8": _decode_int8,
    "fp8": _decode_fp8,
}


def _constant(value: np.float32, like: torch.Tensor) -> torch.Tensor:
    # Unlike torch.tensor(), torch.full() makes no copy from the host that the device would be waited for.
    return torch.full((), float(value), dtype=torch.float32, device=like.device)


def _channel_scales(codec: TapCodec, layer: int, device: torch.device) -> torch.Tensor:
    assert isinstance(codec, Int8Codec)
    return torch.from_numpy(codec.scales(layer)).to(device)
