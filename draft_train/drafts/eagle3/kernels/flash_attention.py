"""Attention of one unroll step through FlashAttention 4, for GPUs that it runs faster on than `attention_kernels`.

It knows windows by place, not by position, and no key of a row's own. So rows are cut into runs of neighbours, each
with the keys that it sees, and a row's own keys are merged into its output and log-sum-exp afterwards. The backward
pass is given the merged ones: its probabilities exp(s - LSE) and its sum of upstream times output are then those of all
keys, so no gradient of a log-sum-exp appears here either (as between devices in Liu et al. 2023, Ring Attention).

Shape suffixes as in `attention`; B runs, M their keys, one run's behind the other's.
"""

from __future__ import annotations

import math
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from draftcache.draft_train.drafts.eagle3.kernels import diagonal_keys as diagonal_keys
from draftcache.draft_train.drafts.eagle3.kernels.runs import Runs
from draftcache.draft_train.drafts.eagle3.kernels.sight import Attended, Sight
from draftcache.store.common.triton_launch import runs_kernels

AT_COMPILATION = "Argument aux_data"
"""How a warning of FlashAttention's about itself begins, which comes with every kernel that it compiles."""
_WIDTHS = (64, 128)
"""Heads' widths. Of 16, which it takes too, version 4.0.0b36 gives wrong gradients on an H100."""


def forward(q: Tensor, kv: Tensor, diagonal: Tensor, sight: Sight) -> tuple[Tensor, Tensor]:
    """See `attention.attend`: output [T, N, D] and log-sum-exp [N, T]."""
    k, v = _keys(kv, sight)
    out, log_sum_exp = window_attention(q, k, v, _runs(sight), sight.window - sight.step)
    if sight.step:
        merge = diagonal_keys.merge_diagonal if runs_kernels(q) else merge_diagonal_reference
        merge(q, diagonal, sight, out, log_sum_exp)
    return out, log_sum_exp


def backward(upstream: Tensor, held: Attended, kv_gradient: Tensor, diagonal_gradient: Tensor) -> Tensor:
    """See `attention.attend_backward`."""
    sight = held.sight
    runs = _runs(sight)
    q_gradient, *gradients = window_attention_backward(
        upstream, held.q, *_keys(held.kv, sight), held.out, held.log_sum_exp, runs, sight.window - sight.step
    )
    for part, gradient in zip(kv_gradient.unbind(1), gradients, strict=True):
        runs.add(part, gradient)
    if sight.step:
        gradient_of_diagonal = (
            diagonal_keys.diagonal_gradients if runs_kernels(upstream) else diagonal_gradients_reference
        )
        gradient_of_diagonal(upstream, held, q_gradient, diagonal_gradient)
    return q_gradient


def _runs(sight: Sight) -> Runs:
    runs = sight.runs
    assert runs is not None
    return runs


def _keys(kv: Tensor, sight: Sight) -> tuple[Tensor, Tensor]:
    """Keys and values [M, G, D] of the runs."""
    runs = _runs(sight)
    taken = kv if runs.every else kv[runs.taken()]
    return taken[:, 0].contiguous(), taken[:, 1].contiguous()


def window_attention(q: Tensor, k: Tensor, v: Tensor, runs: Runs, reach: int) -> tuple[Tensor, Tensor]:
    """Output [T, N, D] and natural log-sum-exp [N, T] of queries [T, N, D], keys and values [M, G, D].

    The last row of a run sees its last key and the `reach` - 1 before it, the row before one place less.
    """
    if not q.is_cuda:
        return window_attention_reference(q, k, v, runs, reach)
    window = {"window_size_left": reach - 1, "window_size_right": 0}
    if runs.rows.shape[0] == 2:
        out, lse = _flash()[0](q[None], k[None], v[None], return_lse=True, **window)[:2]
        return out[0], lse[0]
    out, lse = _flash()[0](q, k, v, return_lse=True, **_lengths(runs), **window)[:2]
    return out, lse


def window_attention_backward(
    upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor, runs: Runs, reach: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, where `out` and `log_sum_exp` may count more keys than these.

    The same to the bit every time.
    """
    if not q.is_cuda:
        return window_attention_backward_reference(upstream, q, k, v, out, log_sum_exp, runs, reach)
    window = {"window_size_left": reach - 1, "window_size_right": 0, "deterministic": True}
    if runs.rows.shape[0] == 2:
        parts = (part[None] for part in (q, k, v, out, upstream, log_sum_exp))
        dq, dk, dv = _flash()[1](*parts, **window)
        return dq[0], dk[0], dv[0]
    dq, dk, dv = _flash()[1](q, k, v, out, upstream, log_sum_exp, **_lengths(runs), **window)
    return dq, dk, dv


def _lengths(runs: Runs) -> dict[str, Any]:
    return {
        "cu_seqlens_q": runs.rows, "cu_seqlens_k": runs.keys,
        "max_seqlen_q": runs.longest_rows, "max_seqlen_k": runs.longest_keys,
    }  # fmt: skip


@cache
def _flash() -> tuple[Any, Any]:
    """FlashAttention's forward and backward. Not its autograd function, which takes no merged output."""
    warnings.filterwarnings("ignore", message=AT_COMPILATION)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what it imports, among its own packages
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    return _flash_attn_fwd, _flash_attn_bwd


def why_not_flash(head_dim: int, device: torch.device) -> str | None:
    """What keeps `forward` from running on a device; None where nothing does."""
    try:
        _flash()
    except ImportError as exc:
        return f"no FlashAttention 4 ({exc}); pip install 'draftcache[flash]'"
    if head_dim not in _WIDTHS:
        return f"--head-dim {head_dim}: its gradients were checked for {' and '.join(map(str, _WIDTHS))} only"
    major = torch.cuda.get_device_capability(device)[0]
    return None if major in (9, 10) else f"a GPU of compute capability {major}: it needs 9 or 10"


def _scores(q: Tensor, k: Tensor, reach: int) -> Tensor:
    """[N, T, M] of one run, scaled; what is not seen is -inf."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("tnd,mnd->ntm", q.to(wide), k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1))
    row = torch.arange(q.shape[0], device=q.device)[:, None] + (k.shape[0] - q.shape[0])
    key = torch.arange(k.shape[0], device=q.device)[None, :]
    return (scores / math.sqrt(q.shape[-1])).masked_fill((key > row) | (row - key >= reach), -math.inf)


def _parts(runs: Runs) -> list[tuple[slice, slice]]:
    rows, keys = runs.rows.tolist(), runs.keys.tolist()
    return [(slice(*rows[i : i + 2]), slice(*keys[i : i + 2])) for i in range(len(rows) - 1)]


def window_attention_reference(q: Tensor, k: Tensor, v: Tensor, runs: Runs, reach: int) -> tuple[Tensor, Tensor]:
    """See `window_attention`."""
    out, log_sum_exp = torch.empty_like(q), []
    for rows, keys in _parts(runs):
        scores = _scores(q[rows], k[keys], reach)
        values = v[keys].to(scores.dtype).repeat_interleave(q.shape[1] // v.shape[1], 1)
        out[rows] = torch.einsum("ntm,mnd->tnd", scores.softmax(-1), values).to(q.dtype)
        log_sum_exp.append(scores.logsumexp(-1))
    return out, torch.cat(log_sum_exp, dim=1)


def window_attention_backward_reference(
    upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum_exp: Tensor, runs: Runs, reach: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See `window_attention_backward`."""
    groups, group = k.shape[1], q.shape[1] // k.shape[1]
    dq, dk, dv = (torch.empty_like(part) for part in (q, k, v))
    for rows, keys in _parts(runs):
        p = (_scores(q[rows], k[keys], reach) - log_sum_exp[:, rows, None]).exp()
        up, wide_q, wide_out = (part[rows].to(p.dtype) for part in (upstream, q, out))
        wide_k, wide_v = (part[keys].to(p.dtype).repeat_interleave(group, 1) for part in (k, v))
        delta = (up * wide_out).sum(-1).t()[..., None]
        ds = p * (torch.einsum("tnd,mnd->ntm", up, wide_v) - delta) / math.sqrt(q.shape[-1])
        dq[rows] = torch.einsum("ntm,mnd->tnd", ds, wide_k).to(q.dtype)
        for total, weights, by in ((dk, ds, wide_q), (dv, p, up)):
            gradient = torch.einsum("ntm,tnd->mnd", weights, by)
            total[keys] = gradient.view(-1, groups, group, gradient.shape[-1]).sum(2).to(q.dtype)
    return dq, dk, dv


def _diagonal_scores(q: Tensor, diagonal: Tensor, sight: Sight) -> tuple[Tensor, Tensor, Tensor]:
    """Scaled scores [T, N, steps] of a row's own keys, these keys and their values [T, N, steps, D]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    held = diagonal[: sight.step, sight.rows].to(wide).repeat_interleave(q.shape[1] // diagonal.shape[3], 3)
    k, v = (part.permute(1, 2, 0, 3) for part in held.unbind(2))
    return (q.to(wide)[:, :, None] * k).sum(-1) / math.sqrt(q.shape[-1]), k, v


def merge_diagonal_reference(q: Tensor, diagonal: Tensor, sight: Sight, out: Tensor, log_sum_exp: Tensor) -> None:
    """See `own_keys.merge_own`."""
    scores, _, v = _diagonal_scores(q, diagonal, sight)
    before = log_sum_exp.t().to(scores.dtype)
    merged = torch.logaddexp(before, scores.logsumexp(-1))
    shares = (scores - merged[..., None]).exp()[..., None]
    out.copy_(out * (before - merged).exp()[..., None] + (shares * v).sum(2))
    log_sum_exp.copy_(merged.t())


def diagonal_gradients_reference(
    upstream: Tensor, held: Attended, q_gradient: Tensor, diagonal_gradient: Tensor
) -> None:
    """See `own_keys.own_gradients`."""
    q, sight = held.q, held.sight
    scores, k, v = _diagonal_scores(q, held.diagonal, sight)
    up = upstream.to(scores.dtype)
    p = (scores - held.log_sum_exp.t()[..., None]).exp()
    delta = (up * held.out).sum(-1)
    ds = p * ((up[:, :, None] * v).sum(-1) - delta[..., None]) / math.sqrt(q.shape[-1])
    q_gradient += (ds[..., None] * k).sum(2).to(q.dtype)
    groups = held.diagonal.shape[3]
    for number, (weights, by) in enumerate(((ds, q), (p, up))):
        gradient = (weights[..., None] * by[:, :, None]).view(by.shape[0], groups, -1, sight.step, by.shape[-1]).sum(2)
        diagonal_gradient[: sight.step, sight.rows, number] += gradient.permute(2, 0, 1, 3).to(diagonal_gradient.dtype)
