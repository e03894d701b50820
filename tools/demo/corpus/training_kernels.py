"""Plain-torch replacements that make the Hugging Face NemotronH cheap to train and easy to compile.

Three functions of the model are replaced while it trains, each equal to the original up to rounding (tests compare
them): the chunked state-space scan (matrix products in the activations' dtype, decays in fp32, no
[chunk, chunk, heads, state] product), the causal depthwise convolution (shifted multiply-adds, which fuse),
and the routed experts (dense over 4 experts: no data-dependent shapes, twice the arithmetic of top-2).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["causal_conv", "chunked_scan", "dense_experts", "install"]


def chunked_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor,
    dt_bias: Tensor,
    dt_limit: tuple[float, float],
    **_: Any,
) -> Tensor:
    """Compute Mamba-2's state-space dual form (Dao and Gu 2024, listing 1), from a zero state.

    Shapes: hidden_states [b, L, h, p], dt [b, L, h], A [h], B and C [b, L, g, n], D and dt_bias [h]; L is a
    multiple of `chunk_size`. Returns [b, L, h, p] in fp32. Decays and carried states are fp32.
    """
    batch, length, heads, width = hidden_states.shape
    groups, state = B.shape[2:]
    chunks, per_group = length // chunk_size, heads // groups
    dtype = hidden_states.dtype
    step = F.softplus(dt.float() + dt_bias.float()).clamp(*dt_limit)
    x = hidden_states.reshape(batch, chunks, chunk_size, groups, per_group, width)
    step = step.view(batch, chunks, chunk_size, groups, per_group)
    B = B.reshape(batch, chunks, chunk_size, groups, state)
    C = C.reshape(batch, chunks, chunk_size, groups, state)
    decay = (step * A.float().view(groups, per_group)).permute(0, 1, 3, 4, 2).cumsum(-1)  # [b, c, g, r, l]
    scaled = (x.float() * step[..., None]).to(dtype)

    causal = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).tril()
    within = (decay[..., :, None] - decay[..., None, :]).masked_fill(~causal, float("-inf")).exp()
    scores = torch.einsum("bclgn,bcsgn->bcgls", C, B)
    mixed = (scores[:, :, :, None] * within).to(dtype)
    y = torch.einsum("bcgrls,bcsgrp->bclgrp", mixed, scaled).float()

    to_end = (decay[..., -1:] - decay).exp().permute(0, 1, 4, 2, 3)  # [b, c, l, g, r]
    added = torch.einsum("bclgn,bclgrp->bcgrpn", B, (scaled.float() * to_end[..., None]).to(dtype)).float()
    total = decay[..., -1].cumsum(1)  # [b, c, g, r]: log decay from the start to the end of each chunk
    before = F.pad(total, (0, 0, 0, 0, 1, -1))  # [b, c, g, r]: log decay from the start to the start of each chunk
    earlier = torch.ones(chunks, chunks, dtype=torch.bool, device=x.device).tril(-1)[..., None, None]
    across = (before[:, :, None] - total[:, None, :]).masked_fill(~earlier, float("-inf")).exp()
    with torch.autocast(x.device.type, enabled=False):
        carried = torch.einsum("bczgr,bzgrpn->bcgrpn", across, added)
    from_start = torch.einsum("bclgn,bcgrpn->bclgrp", C, carried.to(dtype)).float()
    y = y + from_start * decay.exp().permute(0, 1, 4, 2, 3)[..., None]
    y = y + x.float() * D.float().view(groups, per_group)[..., None]
    return y.reshape(batch, length, heads, width)


def causal_conv(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **_: Any
) -> Tensor:
    """Apply a depthwise causal convolution and SiLU; hidden_states [b, d, L], weight [d, k].

    Raises ValueError for another activation than SiLU or None.
    """
    if activation not in ("silu", None):
        raise ValueError(f"expected activation 'silu' or None, found {activation!r}")
    length, taps = hidden_states.shape[-1], weight.shape[-1]
    padded = F.pad(hidden_states, (taps - 1, 0)).float()
    out = sum(
        (padded[..., tap : tap + length] * weight[:, tap, None].float() for tap in range(taps)),
        torch.zeros((), device=weight.device),
    )
    if bias is not None:
        out = out + bias.float()[:, None]
    return (F.silu(out) if activation else out).to(hidden_states.dtype)


def dense_experts(experts: nn.Module, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Run all experts on all tokens, weighted by the router's sparse weights; hidden [T, D], indices [T, k].

    The number of tokens that chose each expert is added to `experts.expert_counts`.
    """
    up, down = experts.get_parameter("up_proj"), experts.get_parameter("down_proj")
    gates = torch.zeros(len(hidden), len(up), device=hidden.device).scatter(1, indices, weights.float())
    experts.get_buffer("expert_counts").add_((gates.detach() > 0).sum(0))
    inner = F.relu(F.linear(hidden, up.flatten(0, 1))).square()
    inner = inner.view(len(hidden), *up.shape[:2]) * gates[..., None].to(inner.dtype)
    return F.linear(inner.flatten(1), down.transpose(0, 1).flatten(1)).to(hidden.dtype)


def install(model: nn.Module, modeling: Any) -> None:
    """Replace the three functions for `model`, an instance of `modeling`'s NemotronHForCausalLM."""
    modeling.mamba2_chunk_scan = chunked_scan
    modeling.causal_conv1d_fn = causal_conv
    modeling.mamba2_split_conv1d_scan_combined = lambda *_, **__: None
    for module in model.modules():
        if type(module).__name__ == "NemotronHExperts":
            counts = torch.zeros(len(module.get_parameter("up_proj")), device=next(model.parameters()).device)
            module.register_buffer("expert_counts", counts, persistent=False)
            object.__setattr__(module, "forward", dense_experts.__get__(module))
