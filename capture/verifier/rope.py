"""Rotary embeddings whose frequencies transformers chooses by the longest row of a call, pinned as an engine has them.

LongRoPE (Phi-3, Phi-4-mini, MiniCPM) has short and long factors, and dynamic NTK scaling a base that grows with the
length. transformers decides anew in every call, by the largest position in it; vLLM decides once: LongRoPE by the
length that the model is served with (`max_model_len`, by default `max_position_embeddings`), dynamic NTK by the
configuration. So a conversation's states would depend on its neighbours, and short ones would differ from what is
served.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def pin_rope(model: nn.Module, max_model_len: int | None = None) -> str | None:
    """Have every rotary embedding of a model choose as if its longest served position were in each call.

    `max_model_len` is the length that the model will be served with; None is `max_position_embeddings`. Returns what
    was chosen, for the manifest; None where nothing depends on the length of a call.
    """
    pinned = {
        description
        for module in model.modules()
        if (found := _pinned_position(module, max_model_len)) is not None
        for description in [_pin(module, *found)]
    }
    return "; ".join(sorted(pinned)) or None


def _pinned_position(module: nn.Module, max_model_len: int | None) -> tuple[int | None, str] | None:
    """The position that decides a module's frequencies, and what they are then; None for any other module.

    The position is None where no served call reaches one that changes them.
    """
    kind, config = getattr(module, "rope_type", None), getattr(module, "config", None)
    if not isinstance(kind, str) or config is None:  # the types per layer of models that have several are none of these
        return None
    parameters = getattr(config, "rope_parameters", None) or {}
    positions = getattr(config, "max_position_embeddings", None) or 0
    if kind == "longrope":
        original = int(parameters.get("original_max_position_embeddings", positions))
        served = max_model_len or positions
        if served > original:
            return original, f"longrope, long factors (served length {served} > {original})"
        return (None, f"longrope, short factors (served length {served} <= {original})") if max_model_len else None
    if kind == "dynamic":
        length = int(positions * float(parameters.get("factor", 1.0)))
        return length - 1, f"dynamic NTK, at length {length}"
    return None


def _pin(module: nn.Module, position: int | None, description: str) -> str:
    """Add one more position to each call of a rotary embedding, and take its row off what comes back."""
    if position is None:
        return description

    def add(
        _module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positions = named["position_ids"] if "position_ids" in named else inputs[1]
        last = torch.full_like(positions[..., :1], position)
        positions = torch.cat([positions, last], dim=-1)
        if "position_ids" in named:
            return inputs, named | {"position_ids": positions}
        return (inputs[0], positions, *inputs[2:]), named

    def take_off(_module: nn.Module, _inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> tuple[Any, ...]:
        return tuple(values[..., :-1, :] for values in output)

    module.register_forward_pre_hook(add, with_kwargs=True)
    module.register_forward_hook(take_off)
    return description
