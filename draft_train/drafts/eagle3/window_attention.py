"""Attention of the unrolled draft: step-0 keys inside a sliding window, plus each row's own later keys.

At step k, the row at position t sees the step-0 keys of positions j with `j <= t` and `t + k - j < window`
(the served window counts the draft's own keys, so it slides with the step), and its own keys of steps 1..k.

Shape suffixes: Q query rows, R key rows, N query heads, G key-value heads, D head width, K diagonal keys.
"""

from __future__ import annotations

import math

import torch
from torch.utils.checkpoint import checkpoint

QUERY_BLOCK = 256
"""Queries per block: its keys are those in its window, so packed conversations do not pay for one another."""

KEPT_SCORES = 1 << 26
"""Scores (256 MiB in float32) that one call may keep for the backward pass; above it they are recomputed."""


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
    """The same values and gradients in blocks of 256 queries, each over the keys that its window can reach.

    Work is Q x (window + block) instead of Q x R. Where all blocks' scores would take too much memory, each block's
    are recomputed in the backward pass, and only one block's are alive at a time.
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
