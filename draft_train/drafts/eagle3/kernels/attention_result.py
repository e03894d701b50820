"""The result of attention, with the operands that its backward pass reads again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from draftcache.draft_train.drafts.eagle3.kernels.step_mask import StepMask


@dataclass(frozen=True)
class AttentionResult:
    """Operands and results of the attention of one unroll step. Shape suffixes are those of `attention`."""

    q: Tensor
    """[T, N, D] queries."""
    kv: Tensor
    """[R, 2, G, D] step-0 keys and values."""
    diagonal: Tensor
    """[steps, S, 2, G, D] diagonal keys and values, of which the first `mask.step` steps are seen."""
    mask: StepMask
    out: Tensor
    """[T, N, D] attention output."""
    log_sum_exp: Tensor
    """[N, T] log-sum-exp of each row's scores, natural, in float32 at least."""
