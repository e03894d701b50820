"""Attention of the unrolled draft: step-0 keys inside a sliding window, and each row's diagonal keys.

At step k, the row at position t sees the step-0 keys of positions j with `j <= t` and `t + k - j < window`, and its
diagonal keys: those that it made itself at steps 1..k. The window slides with the step, because the window of a served
draft counts the keys of drafted tokens too.

Shape suffixes: Q query rows, R key rows, N query heads, G key-value heads, D head width, K diagonal keys.
"""

from __future__ import annotations

import math

import torch
from torch.utils.checkpoint import checkpoint

QUERY_BLOCK = 256
"""Queries per block. A block reads only the keys in its window, so packed conversations cost each other nothing."""

KEPT_SCORES = 1 << 26
"""Most scores (256 MiB in float32) that one call keeps for the backward pass. If there are more, it recomputes them."""


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
    """Plain twin of `window_attention`: the definition, with all scores in one tensor [N, Q, R + K].

    Returns the attention output [N, Q, D]. `diagonal_keys` and `diagonal_values` hold one [G, Q, D] for each of the
    steps 1..k. Positions are int64, ascending.
    """
    group = query_NQD.shape[0] // key_GRD.shape[0]
    scale = 1.0 / math.sqrt(query_NQD.shape[-1])
    base = query_NQD @ key_GRD.repeat_interleave(group, 0).transpose(1, 2) * scale
    distance = query_positions[:, None] - key_positions[None, :]
    base = base.masked_fill((distance < 0) | (distance + step >= window), -math.inf)
    diagonal = [(query_NQD * key.repeat_interleave(group, 0)).sum(-1, keepdim=True) * scale for key in diagonal_keys]
    scores = torch.cat([base, *diagonal], dim=-1)
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
    """Return what `dense_window_attention` returns, in blocks of 256 queries over the keys that their windows reach.

    The work is Q x (window + block) instead of Q x R. If the scores of all blocks would take too much memory, the
    backward pass recomputes them block by block, and only one block's scores are alive at a time.
    """
    queries = query_NQD.shape[1]
    firsts = torch.arange(0, queries, QUERY_BLOCK, device=query_positions.device)
    lasts = torch.clamp(firsts + QUERY_BLOCK, max=queries) - 1
    low = torch.searchsorted(key_positions, query_positions[firsts] + step - window + 1).tolist()
    high = torch.searchsorted(key_positions, query_positions[lasts], right=True).tolist()
    spans = [
        (slice(first, first + QUERY_BLOCK), slice(low[number], high[number]))
        for number, first in enumerate(firsts.tolist())
    ]
    scores = query_NQD.shape[0] * QUERY_BLOCK * sum(keys.stop - keys.start for _, keys in spans)

    def block(rows: slice, keys: slice) -> torch.Tensor:
        return dense_window_attention(
            query_NQD[:, rows],
            key_GRD[:, keys],
            value_GRD[:, keys],
            [key[:, rows] for key in diagonal_keys],
            [value[:, rows] for value in diagonal_values],
            query_positions[rows],
            key_positions[keys],
            step=step,
            window=window,
        )

    if scores > KEPT_SCORES:
        return torch.cat([checkpoint(block, rows, keys, use_reentrant=False) for rows, keys in spans], dim=1)
    return torch.cat([block(rows, keys) for rows, keys in spans], dim=1)
