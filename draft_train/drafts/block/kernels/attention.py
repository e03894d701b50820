"""Attention of block drafts: context rows inside the sliding window, and the slots of the own block.

A batch has R context rows and S blocks of B slots, and only slots have queries. Positions ascend, so what a tile of
queries or keys sees is a range that `BlockMask` finds by search: no mask tensor is made, no kernel is compiled for a
length, and the host never waits for the device.

Queries of one key-value head are taken as one list of rows (block, slot, head of the group), cut into tiles of 128:
no tile holds padding, whatever B and the group are, and all its rows read the same keys from the cache. A tile of B = 8
and 16 heads a group is one block; one of B = 5 and 2 heads holds 13, and goes over the union of their ranges.

Operations. A query that sees V keys takes 4 V D in the forward pass (two products) and 14 V D in the backward pass
(seven: scores and gradients of probabilities are made twice, once by the programs that own queries and once by those
that own keys; one pass with atomics would take 10 V D). In a batch of S = 32,768 blocks, B = 8, N = 32, D = 128 and
causal window 1,024, slot j sees 1,023 - j context rows and j + 1 slots, so V = 1,024: 4.4e12 operations a layer forward
and 15.4e12 backward, no less than 4.4 and 15.6 ms at the 989e12 a second of an H100. Queries and output take 4.3 GB,
1.3 ms. A program that owns 64 keys reads 512 bytes of a query row for 64 x 8 x D operations, 128 a byte; these reads
come from the L2 cache, as neighbouring programs read the same queries.

Sinks take part in the log-sum-exp and nothing else: the backward pass uses probabilities over all keys and the sink at
once, and the sum of the upstream gradient times output stays the term to subtract (Dao 2023, section 3.1).

Shape suffixes: S blocks, B slots of a block, R context rows, N query heads, G key-value heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from draftcache.draft_train.drafts.block.block_attention import block_scores, dense_block_attention
from draftcache.draft_train.drafts.block.kernels import key_gradients, query_kernels
from draftcache.draft_train.drafts.block.kernels.attention_result import BlockAttentionResult
from draftcache.draft_train.drafts.block.kernels.block_mask import BlockMask
from draftcache.store.common.triton_launch import runs_kernels


def attend_blocks(
    q: Tensor, context_kv: Tensor, block_kv: Tensor, mask: BlockMask, sinks: Tensor | None
) -> BlockAttentionResult:
    """Return the attention of queries [S, B, N, D] over `context_kv` [R, 2, G, D] and `block_kv` [S, B, 2, G, D].

    The three are contiguous and of one dtype; D must be a power of two from 16 to 256 on a GPU. `sinks` are [N] float32
    logits, or None. The blocks may be a slice of a batch's, and then `mask` is that slice's, over all context rows.
    """
    if not runs_kernels(q):
        return attend_blocks_reference(q, context_kv, block_kv, mask, sinks)
    out, log_sum_exp = query_kernels.forward(q, context_kv, block_kv, mask, sinks)
    return BlockAttentionResult(q, context_kv, block_kv, mask, sinks, out, log_sum_exp)


def attend_blocks_backward(
    upstream: Tensor, result: BlockAttentionResult, context_gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of queries [S, B, N, D], of `block_kv` [S, B, 2, G, D] and of the sinks [N] (None without).

    `upstream` [S, B, N, D], contiguous, is the gradient of the output. The gradient of `context_kv` is added to
    `context_gradient` [R, 2, G, D] float32, contiguous, so that slices of the blocks sum up. The gradients of queries
    and block have their operands' dtype, that of the sinks is float32. All are the same bits every time.

    Where few tiles of context are in reach of the blocks, sums of parts take up to 512 MiB for a while: a multiple of
    `context_gradient`. A caller that knows on the host which rows its slice reaches saves most of it by passing these
    rows of `context_kv` and of `context_gradient` with `BlockMask.part(blocks, rows)`.
    """
    if not runs_kernels(result.q):
        return attend_blocks_backward_reference(upstream, result, context_gradient)
    q_gradient, delta = query_kernels.query_gradient(upstream, result)
    key_gradients.add_context_gradient(upstream, result, delta, context_gradient)
    block_gradient = key_gradients.block_gradient(upstream, result, delta)
    if result.sinks is None:
        return q_gradient, block_gradient, None
    shares = torch.exp(result.sinks - result.log_sum_exp)
    return q_gradient, block_gradient, -(shares * delta).sum((0, 1))


def attend_blocks_reference(
    q: Tensor, context_kv: Tensor, block_kv: Tensor, mask: BlockMask, sinks: Tensor | None
) -> BlockAttentionResult:
    """Plain twin of `attend_blocks`, by `dense_block_attention`, which holds all scores at once."""
    out = dense_block_attention(q, context_kv, block_kv, mask, sinks)
    log_sum_exp = torch.logsumexp(block_scores(q, context_kv, block_kv, mask), dim=-1).reshape(q.shape[:3])
    if sinks is not None:
        log_sum_exp = torch.logaddexp(log_sum_exp, sinks.to(log_sum_exp.dtype))
    return BlockAttentionResult(q, context_kv, block_kv, mask, sinks, out, log_sum_exp)


def attend_blocks_backward_reference(
    upstream: Tensor, result: BlockAttentionResult, context_gradient: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Plain twin of `attend_blocks_backward`, by autograd over the definition, which computes the output again."""
    with torch.enable_grad():
        operands = (result.q, result.context_kv, result.block_kv, result.sinks)
        q, context_kv, block_kv, sinks = (None if part is None else part.detach().requires_grad_() for part in operands)
        assert q is not None
        assert context_kv is not None
        assert block_kv is not None
        found = dense_block_attention(q, context_kv, block_kv, result.mask, sinks)
        leaves = [q, context_kv, block_kv] if sinks is None else [q, context_kv, block_kv, sinks]
        gradients = torch.autograd.grad(found, leaves, upstream, materialize_grads=True)
    context_gradient += gradients[1]
    return gradients[0], gradients[2], None if sinks is None else gradients[3]
