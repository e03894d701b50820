"""Attention of the unrolled draft: step-0 keys inside a sliding window, plus each row's own later keys.

At step k, the row at position t sees the step-0 keys of positions j with `j <= t` and `t + k - j < window`
(the served window counts the draft's own keys, so it slides with the step), and its own keys of steps 1..k.

Shape suffixes: Q query rows, R key rows, N query heads, G key-value heads, D head width, K diagonal keys.
"""

from __future__ import annotations

import math

import torch
from torch.utils.checkpoint import checkpoint

QUERY_BLOCK = 1024


def dense_window_attention(
    query_NQD: torch.Tensor,
    key_GRD: torch.Tensor,
    value_GRD: torch.Tensor,
    diagonal_keys: list[torch.Tensor],
    diagonal_values: list[torch.Tensor],
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    *,
    step: int,
    window: int,
) -> torch.Tensor:
    """The definition, with every score in one [N, Q, R + K] tensor. Returns [N, Q, D]. The reference twin.

    `diagonal_keys` and `diagonal_values`: one [G, Q, D] per step 1..k. Positions are int64, ascending.
    """
    group = query_NQD.shape[0] // key_GRD.shape[0]
    scale = 1.0 / math.sqrt(query_NQD.shape[-1])
    base = query_NQD @ key_GRD.repeat_interleave(group, 0).transpose(1, 2) * scale
    distance = query_positions[:, None] - key_positions[None, :]
    base = base.masked_fill((distance < 0) | (distance + step >= window), -math.inf)
    own = [(query_NQD * key.repeat_interleave(group, 0)).sum(-1, keepdim=True) * scale for key in diagonal_keys]
    scores = torch.cat([base, *own], dim=-1)
    weights = torch.softmax(scores.to(torch.promote_types(scores.dtype, torch.float32)), dim=-1).to(value_GRD.dtype)
    keys = key_GRD.shape[1]
    output = weights[..., :keys] @ value_GRD.repeat_interleave(group, 0)
    for number, value in enumerate(diagonal_values):
        output = output + weights[..., keys + number, None] * value.repeat_interleave(group, 0)
    return output


def window_attention(
    query_NQD: torch.Tensor,
    key_GRD: torch.Tensor,
    value_GRD: torch.Tensor,
    diagonal_keys: list[torch.Tensor],
    diagonal_values: list[torch.Tensor],
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    *,
    step: int,
    window: int,
) -> torch.Tensor:
    """The same values and gradients in blocks of 1,024 queries, each over the keys that its window can reach.

    Work is Q x (window + block) instead of Q x R; with more than one block the scores are recomputed in the
    backward pass, so memory holds one block's scores at a time.
    """
    queries = query_NQD.shape[1]
    if queries <= QUERY_BLOCK:
        return dense_window_attention(
            query_NQD, key_GRD, value_GRD, diagonal_keys, diagonal_values, query_positions, key_positions,
            step=step, window=window,
        )  # fmt: skip
    firsts = torch.arange(0, queries, QUERY_BLOCK, device=query_positions.device)
    lasts = torch.clamp(firsts + QUERY_BLOCK, max=queries) - 1
    low = torch.searchsorted(key_positions, query_positions[firsts] + step - window + 1).tolist()
    high = torch.searchsorted(key_positions, query_positions[lasts], right=True).tolist()
    blocks = []
    for number, first in enumerate(firsts.tolist()):
        rows = slice(first, first + QUERY_BLOCK)
        keys = slice(low[number], high[number])
        blocks.append(
            checkpoint(
                dense_window_attention,
                query_NQD[:, rows],
                key_GRD[:, keys],
                value_GRD[:, keys],
                [key[:, rows] for key in diagonal_keys],
                [value[:, rows] for value in diagonal_values],
                query_positions[rows],
                key_positions[keys],
                step=step,
                window=window,
                use_reentrant=False,
            )
        )
    return torch.cat(blocks, dim=1)
