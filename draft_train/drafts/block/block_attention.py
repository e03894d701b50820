"""Attention of block drafts: context rows inside a sliding window, and the slots of the own block.

`dense_block_attention` is the definition. `block_attention` returns the same from scores of slices of the blocks, for
autograd at real lengths. `kernels.attention` is the pass for GPUs. All take what `kernels.block_mask` says is visible.

Shape suffixes: S blocks, B slots of a block, R context rows, N query heads, G key-value heads, D head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from draftcache.draft_train.drafts.block.kernels.block_mask import BlockMask

SLICE_SLOTS = 256
"""Slots of a slice of blocks. A slice reads only the rows in its window, so packed conversations cost nothing."""

KEPT_SCORES = 1 << 26
"""Most scores (256 MiB in float32) that one call keeps for the backward pass. If there are more, it recomputes them."""


def dense_block_attention(
    q: Tensor, context_kv: Tensor, block_kv: Tensor, mask: BlockMask, sinks: Tensor | None
) -> Tensor:
    """Return the attention [S, B, N, D] of the slots' queries `q`, with all scores in one tensor [S, B, N, R + B].

    `context_kv` [R, 2, G, D] and `block_kv` [S, B, 2, G, D] hold keys first, then values. Query head n uses the
    key-value head n // (N / G), and scores are divided by sqrt(D). `sinks` [N], where given, are logits that take part
    in the softmax of their head and have no value. The softmax is in float32 at least; the result has the dtype of q.
    """
    scores = block_scores(q, context_kv, block_kv, mask)
    rows, (groups, group) = context_kv.shape[0], scores.shape[2:4]
    if sinks is not None:
        column = sinks.to(scores.dtype).view(groups, group, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = torch.softmax(scores, dim=-1).to(q.dtype)
    on_context, on_slots = weights[..., :rows], weights[..., rows : rows + q.shape[1]]
    out = torch.einsum("sbgnr,rgd->sbgnd", on_context, context_kv[:, 1])
    return (out + torch.einsum("sbgni,sigd->sbgnd", on_slots, block_kv[:, :, 1])).reshape(q.shape)


def block_scores(q: Tensor, context_kv: Tensor, block_kv: Tensor, mask: BlockMask) -> Tensor:
    """Return the scaled scores [S, B, G, N / G, R + B], in float32 at least; those of keys that are not seen are -inf.

    The arguments are those of `dense_block_attention`. The keys are the context rows, then the slots of the own block.
    """
    blocks, slots, heads, width = q.shape
    groups = context_kv.shape[2]
    grouped = q.reshape(blocks, slots, groups, heads // groups, width)
    context = torch.einsum("sbgnd,rgd->sbgnr", grouped, context_kv[:, 0])
    context = context.masked_fill(~mask.context_seen(slots)[:, :, None, None], -math.inf)
    own = torch.einsum("sbgnd,sigd->sbgni", grouped, block_kv[:, :, 0])
    own = own.masked_fill(~mask.slots_seen(slots)[:, None, None], -math.inf)
    scores = torch.cat((context, own), dim=-1)
    return scores.to(torch.promote_types(scores.dtype, torch.float32)) / math.sqrt(width)


def block_attention(q: Tensor, context_kv: Tensor, block_kv: Tensor, mask: BlockMask, sinks: Tensor | None) -> Tensor:
    """Return what `dense_block_attention` returns, in slices of 256 slots over the context rows that they reach.

    The work is S x B x (window + slice) instead of S x B x R. If the scores of all slices would take too much memory,
    the backward pass recomputes them slice by slice, and only one slice's scores are alive at a time. It waits for the
    device once, to learn which rows the slices reach.
    """
    blocks, slots, heads = q.shape[:3]
    step = max(1, SLICE_SLOTS // slots)
    if not blocks:
        return dense_block_attention(q, context_kv, block_kv, mask, sinks)
    low, high = mask.context_range(slots)
    firsts = torch.arange(0, blocks, step, device=low.device)
    lasts = (firsts + step).clamp(max=blocks) - 1
    edges = torch.stack((firsts, low[firsts, 0], high[lasts])).T.tolist()
    spans = [(slice(first, first + step), slice(begin, end)) for first, begin, end in edges]
    scores = heads * slots * step * sum(rows.stop - rows.start for _, rows in spans)

    def part(taken: slice, rows: slice) -> Tensor:
        return dense_block_attention(q[taken], context_kv[rows], block_kv[taken], mask.part(taken, rows), sinks)

    if scores > KEPT_SCORES:
        return torch.cat([checkpoint(part, taken, rows, use_reentrant=False) for taken, rows in spans])
    return torch.cat([part(taken, rows) for taken, rows in spans])
