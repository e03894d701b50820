"""The final norm, measured through its module: what it computes, its effective weight, its epsilon.

The stored weight need not be the one that multiplies: many models keep w and multiply by 1 + w, and some have none. So
vectors of known mean and RMS are sent through a float32 copy of the module, the weight is read from what comes back,
and random vectors show whether that weight explains the module.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from draftcache.store.common.errors import InputError

RMS_NORM, LAYER_NORM, OTHER = "rms_norm", "layer_norm", "other"
_EPSILONS = (
    "variance_epsilon", "eps", "epsilon", "rms_norm_eps", "rms_norm_epsilon", "layer_norm_eps", "layer_norm_epsilon",
    "norm_eps", "norm_epsilon",
)  # fmt: skip
_TOLERANCE = 1e-3
"""Relative difference of a row that the measured weight may leave unexplained; a right one leaves 1e-6."""
_SAME = 1e-5
_SMALL = 1e-3
"""RMS of the vectors that show epsilon: squared it is 1e-6, as small as the usual values."""


@dataclass(frozen=True)
class FinalNorm:
    """What a final norm computes, as `weight * x / sqrt(mean(x^2) + eps)` for "rms_norm"."""

    kind: str
    """ "rms_norm"; "layer_norm", which subtracts the mean and may add a bias; or "other"."""
    weight: Tensor
    """[H] float32, the factors that the module really applies; ones where it has none."""
    eps: float

    def to_json(self) -> dict[str, str]:
        """`final_norm` for the manifest; nothing for an RMS norm, which is what a store has unless it says so."""
        return {} if self.kind == RMS_NORM else {"final_norm": self.kind}


@torch.inference_mode()
def measure_norm(norm: nn.Module, config: Any, hidden_size: int) -> FinalNorm:
    """Measure a final norm over `hidden_size` channels, at least 3.

    Raises InputError for a norm over another number. `config` is the model's, for the exact value of an epsilon that
    the module keeps under no name.
    """
    module = copy.deepcopy(norm).float()
    device = next((item.device for item in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    signs = _mean_zero(hidden_size).to(device)
    try:
        bias = module(torch.zeros(1, hidden_size, device=device))[0]
    except RuntimeError as exc:
        raise InputError(
            f"{type(norm).__name__}: expected a final norm over the {hidden_size} channels of blocks' states, "
            f"found one of another width ({exc})"
        ) from exc
    plain = _gains(module, signs, bias)
    eps = _named(_measured_eps(module, signs, bias, plain), norm, config)
    weight = plain / signs * math.sqrt(float(signs.square().mean()) + eps)
    kind = _kind(module, weight, bias, eps)
    return FinalNorm(kind, _exact(weight, norm).cpu(), eps)


def _mean_zero(size: int) -> Tensor:
    """[size] float32 of mean 0 and no entry 0: signs that alternate, and 1, 1, -2 at the end of an odd number."""
    signs = torch.tensor([1.0, -1.0]).repeat(size // 2 + 1)[:size]
    if size % 2:
        signs[-3:] = torch.tensor([1.0, 1.0, -2.0])
    return signs


def _gains(module: nn.Module, row: Tensor, bias: Tensor) -> Tensor:
    return module(row[None])[0] - bias  # type: ignore[no-any-return]


def _measured_eps(module: nn.Module, signs: Tensor, bias: Tensor, plain: Tensor) -> float:
    """Epsilon from the norms of what comes back for `signs` and for as much smaller ones; 0 where they say nothing."""
    power = float(signs.square().mean())
    ratio = float((_gains(module, _SMALL * signs, bias).norm() / plain.norm()).square())
    below = ratio - _SMALL**2
    found = _SMALL**2 * power * (1 - ratio) / below if below > 0 else 0.0
    return found if 0 < found < math.inf else 0.0


def _named(measured: float, norm: nn.Module, config: Any) -> float:
    """The value of a known name that is the measured one, or else the measured one to three digits."""
    for source in (norm, config):
        for name in _EPSILONS:
            value = getattr(source, name, None)
            if isinstance(value, float) and math.isclose(value, measured, rel_tol=0.01, abs_tol=1e-9):
                return value
    return float(f"{measured:.3g}")


def _kind(module: nn.Module, weight: Tensor, bias: Tensor, eps: float) -> str:
    """Which formula gives what the module gives, for random rows of several sizes and means."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, weight.shape[0], generator=generator) + torch.randn(12, 1, generator=generator)
    rows = (rows * torch.logspace(-3, 2, 12)[:, None]).to(weight.device)
    found = module(rows[None])[0]
    centred = rows - rows.mean(-1, keepdim=True)
    for kind, inputs, added in ((RMS_NORM, rows, torch.zeros_like(bias)), (LAYER_NORM, centred, bias)):
        expected = weight * inputs * torch.rsqrt(inputs.square().mean(-1, keepdim=True) + eps) + added
        if bool(((found - expected).norm(dim=-1) <= _TOLERANCE * expected.norm(dim=-1)).all()):
            return kind
    return OTHER


def _exact(measured: Tensor, norm: nn.Module) -> Tensor:
    """The measured weight without the rounding of measuring, where it is the module's weight w, 1 + w, or ones."""
    stored = getattr(norm, "weight", None)
    known = [torch.ones_like(measured)]
    if isinstance(stored, Tensor) and stored.shape == measured.shape:
        known += [stored.detach().float(), 1.0 + stored.detach().float()]
    for values in known:
        if torch.allclose(measured, values, rtol=_SAME, atol=_SAME):
            return values
    return measured
