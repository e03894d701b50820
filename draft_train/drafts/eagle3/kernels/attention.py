"""Attention of one unroll step: step-0 keys inside the sliding window, and each row's own keys of later steps.

Which keys a block of queries sees follows from sorted positions by arithmetic: no mask is ever made, and no kernel is
compiled for a length. A row's own keys start the online softmax, so the two parts need no merging, and the gradient
of the log-sum-exp never appears: the backward pass uses probabilities over all keys at once (Dao 2023, section 3.1).

Shape suffixes: T query rows, S start rows, R step-0 rows, N query heads, G key-value heads, D head width.
Key-value memory holds keys first: [rows, 2, G, D]; that of later steps is [steps, S, 2, G, D].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from draftcache.draft_train.drafts.eagle3.kernels import attention_kernels as kernels
from draftcache.draft_train.drafts.eagle3.kernels import flash_attention
from draftcache.draft_train.drafts.eagle3.kernels.sight import Attended, Sight
from draftcache.draft_train.drafts.eagle3.window_attention import dense_window_attention
from draftcache.store.common.triton_launch import runs_kernels


def attend(q: Tensor, kv: Tensor, diagonal: Tensor, sight: Sight) -> Attended:
    """Attention of queries [T, N, D] over `kv` and the first `step` of `own`.

    D must be a power of two from 16 to 256 on a GPU. Every row sees at least its own step-0 key.
    """
    if sight.runs is not None:
        return Attended(q, kv, diagonal, sight, *flash_attention.forward(q, kv, diagonal, sight))
    if not runs_kernels(q):
        return attend_reference(q, kv, diagonal, sight)
    return Attended(q, kv, diagonal, sight, *kernels.forward(q, kv, diagonal, sight))


def attend_backward(upstream: Tensor, held: Attended, kv_gradient: Tensor, diagonal_gradient: Tensor) -> Tensor:
    """Gradient [T, N, D] of the queries; those of keys and values are added to `kv_gradient` and `own_gradient`.

    `upstream` [T, N, D]. The added-to are float32 of the shapes of kv and own. From our own kernels the gradient takes
    the place of `held.out`, whose memory counts at long lengths.
    """
    if held.sight.runs is not None:
        return flash_attention.backward(upstream, held, kv_gradient, diagonal_gradient)
    if not runs_kernels(held.q):
        return attend_backward_reference(upstream, held, kv_gradient, diagonal_gradient)
    return kernels.backward(upstream, held, kv_gradient, diagonal_gradient)


def attend_reference(q: Tensor, kv: Tensor, diagonal: Tensor, sight: Sight) -> Attended:
    """See `attend`; every score at once."""
    held = [diagonal[step, sight.rows].transpose(0, 1) for step in range(sight.step)]
    out = dense_window_attention(
        q.transpose(0, 1),
        kv[:, 0].transpose(0, 1),
        kv[:, 1].transpose(0, 1),
        [part[0].transpose(0, 1) for part in held],
        [part[1].transpose(0, 1) for part in held],
        sight.positions,
        sight.key_positions,
        step=sight.step,
        window=sight.window,
    )
    return Attended(q, kv, diagonal, sight, out.transpose(0, 1).contiguous(), _log_sum_exp(q, kv, diagonal, sight))


def _log_sum_exp(q: Tensor, kv: Tensor, diagonal: Tensor, sight: Sight) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // kv.shape[2]
    wide = q.to(dtype)
    scores = torch.einsum("tnd,rnd->ntr", wide, kv[:, 0].repeat_interleave(group, 1).to(dtype))
    distance = sight.positions[:, None] - sight.key_positions[None, :]
    scores = scores.masked_fill((distance < 0) | (distance + sight.step >= sight.window), -math.inf)
    diagonals = [
        torch.einsum("tnd,tnd->nt", wide, diagonal[step, sight.rows, 0].repeat_interleave(group, 1).to(dtype))[
            ..., None
        ]
        for step in range(sight.step)
    ]
    return torch.logsumexp(torch.cat([scores, *diagonals], dim=-1) / math.sqrt(q.shape[-1]), dim=-1)


def attend_backward_reference(
    upstream: Tensor, held: Attended, kv_gradient: Tensor, diagonal_gradient: Tensor
) -> Tensor:
    """See `attend_backward`; by autograd, so output and log-sum-exp are made anew."""
    with torch.enable_grad():
        leaves = [part.detach().requires_grad_() for part in (held.q, held.kv, held.diagonal)]
        found = attend_reference(leaves[0], leaves[1], leaves[2], held.sight).out
        gradients = torch.autograd.grad(found, leaves, upstream, materialize_grads=True)
    kv_gradient += gradients[1]
    diagonal_gradient += gradients[2]
    return gradients[0]
