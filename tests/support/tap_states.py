"""Hidden states that are hard on codecs, and the comparison of the codecs' numpy form with their tensor form."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from draftcache.store.format import torch_codecs
from draftcache.store.format.bf16 import float32_to_bf16
from draftcache.store.format.channel_scales import Calibration
from draftcache.store.format.tap_codecs import TapCodec, tap_codec

LAYER = 2
"""The tap that the states are of."""
HIDDEN = (1, 8, 100, 128, 130, 2688)
"""Widths of states: less than a block, a block, no multiple of one, and the 30B verifier's."""
EXACT = ("bf16", "lossless")
"""The modes that give every bit back."""


def outlier_states(rows: int, hidden: int, seed: int = 0) -> NDArray[np.uint16]:
    """Draw bf16 bits [rows, hidden] as real states are: channels of unlike scale, a few massive, some large rows."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(0, 0.7, hidden))
    scale[rng.choice(hidden, max(1, hidden // 300), replace=False)] *= 300
    values = rng.standard_normal((rows, hidden)) * scale * np.exp(rng.normal(0, 0.2, (rows, 1)))
    return float32_to_bf16(values.astype(np.float32))


def nasty_states(hidden: int) -> NDArray[np.uint16]:
    """Make bf16 bits [8, hidden]: zeros, subnormals, the largest values, a block where one value dwarfs the rest."""
    rng = np.random.default_rng(3)
    rows = [np.zeros(hidden), np.full(hidden, 1e-40), np.full(hidden, 3e38), -np.full(hidden, 1e-30)]
    spike = rng.standard_normal(hidden) * 1e-6
    spike[hidden // 2] = 1e4
    tiny = rng.standard_normal(hidden) * 1e-39
    half = np.where(np.arange(hidden) % 2, 0.5, -0.0)
    ties = (np.arange(hidden) - hidden // 2) * 0.5
    return float32_to_bf16(np.stack([*rows, spike, tiny, half, ties]).astype(np.float32))


def every_bit_pattern() -> NDArray[np.uint16]:
    """Return all 65,536 bf16 values as bits [512, 128]."""
    return np.arange(1 << 16, dtype=np.uint16).reshape(-1, 128)


def codec_of(mode: str, states: NDArray[Any]) -> TapCodec:
    """Make the codec of this mode for states [rows, hidden]; int8 is calibrated on them."""
    hidden = states.shape[1]
    scales = None
    if mode == "int8":
        calibration = Calibration((LAYER,), hidden)
        calibration.add(LAYER, states)
        scales = calibration.finish()
    return tap_codec(mode, layers=(LAYER,), hidden_size=hidden, channel_scales=scales)


def compare_with_torch(mode: str, states: NDArray[Any], device: torch.device) -> None:
    """Require that numpy and tensors on `device` give the same bits of states [rows, hidden], both ways."""
    codec = codec_of(mode, states if mode != "int8" else outlier_states(64, states.shape[1]))
    tensor = torch.from_numpy(states.copy())
    tensor = tensor.to(device) if mode == "float32" else tensor.view(torch.bfloat16).to(device)
    expected, found = codec.encode(LAYER, states), torch_codecs.encode(codec, LAYER, tensor)
    assert expected.keys() == found.keys()
    for name, part in expected.items():
        assert found[name].device.type == device.type
        mine = found[name].cpu().numpy()
        assert (mine.shape, mine.dtype) == (part.shape, part.dtype)
        assert mine.tobytes() == np.ascontiguousarray(part).tobytes(), name
    parts = {name: torch.from_numpy(np.ascontiguousarray(part)).to(device) for name, part in expected.items()}
    decoded = torch_codecs.decode(codec, LAYER, parts).cpu()
    bits = decoded.numpy() if mode == "float32" else decoded.view(torch.uint16).numpy()
    assert bits.tobytes() == codec.decode(LAYER, expected).tobytes()
