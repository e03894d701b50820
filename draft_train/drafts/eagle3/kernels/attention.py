"""Attention of one unroll step: step-0 keys inside the sliding window, and each row's diagonal keys.

Which keys a block of queries sees follows from sorted positions by arithmetic, so no mask tensor is ever made and no
kernel is compiled for a length. A row's diagonal keys start its online softmax, so the two kinds of keys need no
merging, and the gradient of the log-sum-exp never appears: the backward pass uses probabilities over all keys at once
(Dao 2023, section 3.1).

Shape suffixes: T query rows, S start rows, R step-0 rows, N query heads, G key-value heads, D head width.
Key-value memory is [R, 2, G, D], keys first. That of diagonal keys is [steps, S, 2, G, D].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from draftcache.draft_train.drafts.eagle3.kernels import attention_kernels as kernels
from draftcache.draft_train.drafts.eagle3.kernels import flash_attention
from draftcache.draft_train.drafts.eagle3.kernels.attention_result import AttentionResult
from draftcache.draft_train.drafts.eagle3.kernels.step_mask import StepMask
from draftcache.draft_train.drafts.eagle3.window_attention import dense_window_attention
from draftcache.store.common.triton_launch import runs_kernels


def attend(q: Tensor, kv: Tensor, diagonal: Tensor, mask: StepMask) -> AttentionResult:
    """Return the attention of queries [T, N, D] over `kv` and the first `mask.step` steps of `diagonal`.

    D must be a power of two from 16 to 256 on a GPU. Every row sees at least its step-0 key.
    """
    if mask.runs is not None:
        return AttentionResult(q, kv, diagonal, mask, *flash_attention.forward(q, kv, diagonal, mask))
    if not runs_kernels(q):
        return attend_reference(q, kv, diagonal, mask)
    return AttentionResult(q, kv, diagonal, mask, *kernels.forward(q, kv, diagonal, mask))


def attend_backward(
    upstream: Tensor, result: AttentionResult, kv_gradient: Tensor, diagonal_gradient: Tensor
) -> Tensor:
    """Return the gradient [T, N, D] of the queries; add the others to `kv_gradient` and `diagonal_gradient`.

    `upstream` [T, N, D] is the gradient of the output. The gradients that are added to are float32, of the shapes of kv
    and diagonal. `attention_kernels` writes the queries' gradient over `result.out`, because its memory counts at long
    lengths.
    """
    if result.mask.runs is not None:
        return flash_attention.backward(upstream, result, kv_gradient, diagonal_gradient)
    if not runs_kernels(result.q):
        return attend_backward_reference(upstream, result, kv_gradient, diagonal_gradient)
    return kernels.backward(upstream, result, kv_gradient, diagonal_gradient)


def attend_reference(q: Tensor, kv: Tensor, diagonal: Tensor, mask: StepMask) -> AttentionResult:
    """Plain twin of `attend`, by `dense_window_attention`, which holds all scores at once."""
    seen = [diagonal[step, mask.rows].transpose(0, 1) for step in range(mask.step)]
    out = dense_window_attention(
        q.transpose(0, 1),
        kv[:, 0].transpose(0, 1),
        kv[:, 1].transpose(0, 1),
        [part[0].transpose(0, 1) for part in seen],
        [part[1].transpose(0, 1) for part in seen],
        mask.positions,
        mask.key_positions,
        step=mask.step,
        window=mask.window,
    )
    log_sum_exp = _log_sum_exp(q, kv, diagonal, mask)
    return AttentionResult(q, kv, diagonal, mask, out.transpose(0, 1).contiguous(), log_sum_exp)


def _log_sum_exp(q: Tensor, kv: Tensor, diagonal: Tensor, mask: StepMask) -> Tensor:
    """Return the log-sum-exp [N, T] of each row's scores."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // kv.shape[2]
    wide = q.to(dtype)
    scores = torch.einsum("tnd,rnd->ntr", wide, kv[:, 0].repeat_interleave(group, 1).to(dtype))
    distance = mask.positions[:, None] - mask.key_positions[None, :]
    scores = scores.masked_fill((distance < 0) | (distance + mask.step >= mask.window), -math.inf)
    diagonals = [
        torch.einsum("tnd,tnd->nt", wide, diagonal[step, mask.rows, 0].repeat_interleave(group, 1).to(dtype))[..., None]
        for step in range(mask.step)
    ]
    return torch.logsumexp(torch.cat([scores, *diagonals], dim=-1) / math.sqrt(q.shape[-1]), dim=-1)


def attend_backward_reference(
    upstream: Tensor, result: AttentionResult, kv_gradient: Tensor, diagonal_gradient: Tensor
) -> Tensor:
    """Plain twin of `attend_backward`, by autograd over `attend_reference`, which computes the output again."""
    with torch.enable_grad():
        leaves = [part.detach().requires_grad_() for part in (result.q, result.kv, result.diagonal)]
        found = attend_reference(leaves[0], leaves[1], leaves[2], result.mask).out
        gradients = torch.autograd.grad(found, leaves, upstream, materialize_grads=True)
    kv_gradient += gradients[1]
    diagonal_gradient += gradients[2]
    return gradients[0]
