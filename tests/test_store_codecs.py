"""Codecs: exact where they say so, within bounds where not, and the tensor form bit for bit the numpy form."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from draftcache.store.common.errors import InputError, StoreError
from draftcache.store.format import torch_codecs
from draftcache.store.format.array_spec import ROWS_AXIS
from draftcache.store.format.bf16 import bf16_to_float32, float32_to_bf16
from draftcache.store.format.channel_scales import Calibration, ChannelScales
from draftcache.store.format.tap_codecs import MODES, tap_codec
from support.tap_states import (
    EXACT,
    HIDDEN,
    LAYER,
    codec_of,
    compare_with_torch,
    every_bit_pattern,
    nasty_states,
    outlier_states,
)

LOSSY = {"int8": 0.008, "fp8": 0.03}


@pytest.mark.parametrize("mode", EXACT)
def test_all_65536_bit_patterns_come_back(mode: str) -> None:
    states = every_bit_pattern()
    codec = codec_of(mode, states)
    parts = codec.encode(LAYER, states)
    np.testing.assert_array_equal(codec.decode(LAYER, parts), states)
    out = np.zeros_like(states)
    assert codec.decode(LAYER, parts, out) is out
    np.testing.assert_array_equal(out, states)
    changed = {name: part.copy() for name, part in parts.items()}
    next(iter(changed.values()))[3, 5] ^= 1
    assert (codec.decode(LAYER, changed) != states).sum() == 1


def test_float32_comes_back() -> None:
    states = np.random.default_rng(0).integers(0, 1 << 32, (64, 16), np.uint32).view(np.float32)
    codec = codec_of("float32", states)
    assert codec.decode(LAYER, codec.encode(LAYER, states)).tobytes() == states.tobytes()


def normalised_error(found: NDArray[Any], states: NDArray[Any]) -> float:
    """Rms of the difference after dividing by each channel's rms."""
    one, two = bf16_to_float32(found).astype(np.float64), bf16_to_float32(states).astype(np.float64)
    rms = np.sqrt((two**2).mean(axis=0))
    return float(np.sqrt((((one - two) / rms) ** 2).mean()))


@pytest.mark.parametrize("mode", LOSSY)
def test_lossy_modes_stay_near_every_channel(mode: str) -> None:
    states = outlier_states(512, 2688)
    codec = codec_of(mode, states)
    error = normalised_error(codec.decode(LAYER, codec.encode(LAYER, states)), states)
    assert LOSSY[mode] / 4 < error < LOSSY[mode]


def test_int8_per_token_would_not() -> None:
    """The negative control: one scale per token leaves small channels nothing beside a massive one."""
    states = outlier_states(512, 2688)
    values = bf16_to_float32(states)
    scale = np.abs(values).max(axis=1, keepdims=True) / 127
    assert normalised_error(float32_to_bf16(np.rint(values / scale) * scale), states) > 0.2


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("mode", MODES)
def test_parts_are_what_the_specs_say(mode: str, hidden: int) -> None:
    states: NDArray[Any] = outlier_states(5, hidden)
    if mode == "float32":
        states = bf16_to_float32(states)
    codec = codec_of(mode, states)
    for rows in (0, 1, 5):
        parts = codec.encode(LAYER, states[:rows])
        specs = codec.specs(LAYER)
        assert parts.keys() == specs.keys()
        for name, spec in specs.items():
            assert spec.axis == ROWS_AXIS
            assert parts[name].shape == (rows, *spec.inner)
            assert parts[name].dtype == spec.dtype
        decoded = codec.decode(LAYER, parts)
        assert (decoded.shape, decoded.dtype) == ((rows, hidden), states.dtype)


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("mode", MODES)
def test_tensors_give_the_same_bits(mode: str, hidden: int) -> None:
    for states in (outlier_states(33, hidden), nasty_states(hidden), outlier_states(1, hidden)[:0]):
        values = bf16_to_float32(states) if mode == "float32" else states
        compare_with_torch(mode, values, torch.device("cpu"))
    if mode in EXACT:
        compare_with_torch(mode, every_bit_pattern(), torch.device("cpu"))


@pytest.mark.parametrize("mode", LOSSY)
def test_nasty_rows_stay_finite_and_zeros_stay_zero(mode: str) -> None:
    states = nasty_states(256)
    scales = ChannelScales({LAYER: np.ones(256, np.float32)})
    codec = tap_codec(mode, layers=(LAYER,), hidden_size=256, channel_scales=scales)
    found = bf16_to_float32(codec.decode(LAYER, codec.encode(LAYER, states)))
    assert not found[0].any()
    assert np.isfinite(found[4:]).all()
    assert math.isclose(found[4].max(), 1e4, rel_tol=0.01)


@pytest.mark.parametrize("mode", LOSSY)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(mode: str, bad: float) -> None:
    states = outlier_states(4, 256)
    codec = codec_of(mode, states)
    states[1, 7] = np.array(bad, ml_dtypes.bfloat16).view(np.uint16)
    with pytest.raises(InputError, match="finite"):
        codec.encode(LAYER, states)
    with pytest.raises(InputError, match="finite"):
        torch_codecs.encode(codec, LAYER, torch.from_numpy(states).view(torch.bfloat16))


def test_wrong_dtypes_modes_and_scales_are_refused() -> None:
    states = outlier_states(4, 128)
    with pytest.raises(InputError, match="uint16"):
        codec_of("lossless", states).encode(LAYER, bf16_to_float32(states))
    with pytest.raises(InputError, match=r"expected one of .*found 'int4'"):
        tap_codec("int4", layers=(LAYER,), hidden_size=8)
    with pytest.raises(InputError, match="scales of 128 channels"):
        tap_codec("int8", layers=(LAYER,), hidden_size=128)
    scales = ChannelScales({LAYER: np.ones(128, np.float32)})
    with pytest.raises(InputError, match="scales of 64 channels"):
        tap_codec("int8", layers=(LAYER,), hidden_size=64, channel_scales=scales)


def test_calibration_is_the_channels_rms_however_it_is_fed() -> None:
    states = outlier_states(300, 130)
    states[:, 7] = 0
    whole, parts, tensors = (Calibration((LAYER,), 130) for _ in range(3))
    whole.add(LAYER, states)
    for first in range(0, 300, 77):
        parts.add(LAYER, states[first : first + 77])
        torch_codecs.add_squares(tensors, LAYER, torch.from_numpy(states[first : first + 77]).view(torch.bfloat16))
    rms = np.sqrt((bf16_to_float32(states).astype(np.float64) ** 2).mean(axis=0))
    rms[7] = 1
    for calibration in (whole, parts, tensors):
        np.testing.assert_allclose(calibration.finish().scales[LAYER], rms, rtol=1e-6)
    with pytest.raises(InputError, match="found 0 rows"):
        Calibration((LAYER,), 8).finish()


def test_scales_survive_json_and_notice_a_change() -> None:
    scales = ChannelScales({LAYER: np.linspace(0.1, 9, 130, dtype=np.float32), 5: np.ones(130, np.float32)})
    text = scales.to_json()
    again = ChannelScales.from_json(text)
    for layer, values in scales.scales.items():
        np.testing.assert_array_equal(again.scales[layer], values)
    text["float32"]["5"], text["float32"]["2"] = text["float32"]["2"], text["float32"]["5"]
    with pytest.raises(StoreError, match="hash"):
        ChannelScales.from_json(text)
