"""The result of the attention of blocks, with the operands that its backward pass reads again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from draftcache.draft_train.drafts.block.kernels.block_mask import BlockMask


@dataclass(frozen=True)
class BlockAttentionResult:
    """Operands and results of the attention of one layer. Shape suffixes are those of `attention`."""

    q: Tensor
    """[S, B, N, D] queries of the slots."""
    context_kv: Tensor
    """[R, 2, G, D] keys and values of the context rows."""
    block_kv: Tensor
    """[S, B, 2, G, D] keys and values of the slots."""
    mask: BlockMask
    sinks: Tensor | None
    """[N] logits without a value, or None."""
    out: Tensor
    """[S, B, N, D] attention output."""
    log_sum_exp: Tensor
    """[S, B, N] log-sum-exp of each query's scores and its sink, natural, in float32 at least."""
