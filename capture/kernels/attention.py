"""Causal grouped-query attention by flash kernels, also where earlier keys come from a cache."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

_FUSED = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]


class KeyValues:
    """Keys and values of one attention block, in memory for `capacity` tokens that is allocated once."""

    def __init__(self, capacity: int) -> None:
        self._capacity, self._filled = capacity, 0
        self._memory: Tensor | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values, each [B, heads, l, d]; returns all that were appended, [B, heads, L, d]."""
        if self._memory is None:
            batch, heads, _, width = keys.shape
            self._memory = keys.new_empty(2, batch, heads, self._capacity, width)
        first, self._filled = self._filled, self._filled + keys.shape[2]
        self._memory[0, :, :, first : self._filled] = keys
        self._memory[1, :, :, first : self._filled] = values
        held = self._memory[:, :, :, : self._filled]
        return held[0], held[1]


def causal_attention(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Causal attention [B, Hq, l, d] of queries at the last l of the keys' L positions; keys [B, Hk, L, d].

    Hk divides Hq. On a GPU only the fused kernels may run, as none of them holds an [l, L] tensor; float32 takes the
    plain twin.
    """
    if not queries.is_cuda:
        return causal_attention_reference(queries, keys, values, scale)
    attend = torch.nn.functional.scaled_dot_product_attention
    if queries.dtype == torch.float32:
        return causal_attention_reference(queries, keys, values, scale)
    if queries.shape[2] == keys.shape[2]:
        with sdpa_kernel(_FUSED, set_priority=True):
            return attend(queries, keys, values, is_causal=True, scale=scale, enable_gqa=True)
    bias = causal_lower_right(queries.shape[2], keys.shape[2])
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        return attend(queries, keys, values, attn_mask=bias, scale=scale, enable_gqa=True)


def causal_attention_reference(queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Plain twin of `causal_attention`; the mask is a tensor [l, L]."""
    rows, length = queries.shape[2], keys.shape[2]
    groups = queries.shape[1] // keys.shape[1]
    mask = torch.ones(rows, length, dtype=torch.bool, device=queries.device).tril(length - rows)
    return torch.nn.functional.scaled_dot_product_attention(
        queries, keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1), attn_mask=mask, scale=scale
    )
