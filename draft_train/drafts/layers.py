"""Modules that drafts of several architectures are made of, with the parameter names that engines load."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class RMSNorm(nn.Module):
    """Computes x / rms(x) * weight in the dtype of the weight (float32), whatever the autocast dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the norm [..., H] of `hidden` [..., H], in its dtype."""
        return F.rms_norm(hidden.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).to(hidden.dtype)


class MLP(nn.Module):
    """The MLP of a layer: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = linear(hidden_size, intermediate_size)
        self.up_proj = linear(hidden_size, intermediate_size)
        self.down_proj = linear(intermediate_size, hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output [..., H] for `hidden` [..., H]."""
        return self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))  # type: ignore[no-any-return]


def linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a linear map without bias."""
    return nn.Linear(inputs, outputs, bias=False)


def compute_dtype(weight: torch.Tensor) -> torch.dtype:
    """Return the autocast dtype where autocast is on for the device of `weight`, else the dtype of `weight`."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


@torch.no_grad()
def draw_weight(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return an initial weight on the CPU: Normal(0, 0.02) for matrices, from `generator`, and 1 for norms."""
    if len(shape) == 2:
        return torch.empty(shape).normal_(0.0, 0.02, generator=generator)
    return torch.ones(shape)
