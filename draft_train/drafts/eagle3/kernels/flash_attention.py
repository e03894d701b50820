"""Attention of one unroll step by FlashAttention 4, for GPUs on which it is faster than `attention_kernels`.

FlashAttention counts a window in rows, not in positions, and knows no diagonal keys. So the rows are cut into runs of
consecutive positions, each with the keys that it sees, and the diagonal keys are merged into output and log-sum-exp
afterwards. The backward pass of FlashAttention is given the merged results. Its probabilities exp(s - LSE) and its sum
of upstream times output are then those over all keys, so no gradient of a log-sum-exp appears here either (as between
devices in Liu et al. 2023, Ring Attention).

Shape suffixes are those of `attention`, with B runs and M keys of all runs, concatenated.
"""

from __future__ import annotations

import math
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from draftcache.draft_train.drafts.eagle3.kernels import diagonal_keys
from draftcache.draft_train.drafts.eagle3.kernels.attention_result import AttentionResult
from draftcache.draft_train.drafts.eagle3.kernels.runs import Runs
from draftcache.draft_train.drafts.eagle3.kernels.step_mask import StepMask
from draftcache.store.common.triton_launch import runs_kernels

AT_COMPILATION = "Argument aux_data"
"""Beginning of a warning that FlashAttention gives about its code whenever it compiles a kernel."""
_WIDTHS = (64, 128)
"""Supported head widths. For 16, which it accepts too, version 4.0.0b36 gives wrong gradients on an H100."""


def forward(q: Tensor, kv: Tensor, diagonal: Tensor, mask: StepMask) -> tuple[Tensor, Tensor]:
    """Return output [T, N, D] and log-sum-exp [N, T] for the arguments of `attention.attend`."""
    k, v = _keys(kv, mask)
    out, log_sum_exp = window_attention(q, k, v, _runs(mask), mask.window - mask.step)
    if mask.step:
        merge = diagonal_keys.merge_diagonal if runs_kernels(q) else merge_diagonal_reference
        merge(q, diagonal, mask, out, log_sum_exp)
    return out, log_sum_exp


def backward(upstream: Tensor, result: AttentionResult, kv_gradient: Tensor, diagonal_gradient: Tensor) -> Tensor:
    """Compute what `attention.attend_backward` does. The result takes newly allocated memory."""
    mask = result.mask
    runs = _runs(mask)
    q_gradient, *gradients = window_attention_backward(
        upstream, result.q, *_keys(result.kv, mask), result.out, result.log_sum_exp, runs, mask.window - mask.step
    )
    for part, gradient in zip(kv_gradient.unbind(1), gradients, strict=True):
        runs.add(part, gradient)
    if mask.step:
        gradient_of_diagonal = (
            diagonal_keys.diagonal_gradients if runs_kernels(upstream) else diagonal_gradients_reference
        )
        gradient_of_diagonal(upstream, result, q_gradient, diagonal_gradient)
    return q_gradient


def _runs(mask: StepMask) -> Runs:
    runs = mask.runs
    assert runs is not None
    return runs


def _keys(kv: Tensor, mask: StepMask) -> tuple[Tensor, Tensor]:
    """Return keys and values of the runs, each [M, G, D]."""
    runs = _runs(mask)
    taken = kv if runs.every else kv[runs.taken()]
    return taken[:, 0].contiguous(), taken[:, 1].contiguous()


def window_attention(q: Tensor, k: Tensor, v: Tensor, runs: Runs, reach: int) -> tuple[Tensor, Tensor]:
    """Return output [T, N, D] and natural log-sum-exp [N, T] of queries [T, N, D] over keys and values [M, G, D].

    The last row of a run sees the last key of the run and the `reach` - 1 keys before it. The window of each row before
    it is one key further back.
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
    """Return the gradients of queries, keys and values. `out` and `log_sum_exp` may be over more keys than these.

    The gradients are the same bits every time.
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
    """Return the arguments that describe several runs to FlashAttention."""
    return {
        "cu_seqlens_q": runs.rows, "cu_seqlens_k": runs.keys,
        "max_seqlen_q": runs.longest_rows, "max_seqlen_k": runs.longest_keys,
    }  # fmt: skip


@cache
def _flash() -> tuple[Any, Any]:
    """Return FlashAttention's forward and backward functions. Its autograd function takes no merged output."""
    warnings.filterwarnings("ignore", message=AT_COMPILATION)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from packages that it imports
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    return _flash_attn_fwd, _flash_attn_bwd


def why_not_flash(head_dim: int, device: torch.device) -> str | None:
    """Return the reason why `forward` can't run on a device; None if it can."""
    try:
        _flash()
    except ImportError as exc:
        return f"no FlashAttention 4 ({exc}); pip install 'draftcache[flash]'"
    if head_dim not in _WIDTHS:
        return f"--head-dim {head_dim}: its gradients were checked for {' and '.join(map(str, _WIDTHS))} only"
    major = torch.cuda.get_device_capability(device)[0]
    return None if major in (9, 10) else f"a GPU of compute capability {major}: it needs 9 or 10"


def _scores(q: Tensor, k: Tensor, reach: int) -> Tensor:
    """Return the scaled scores [N, T, M] of one run, which are -inf where a row does not see a key."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.einsum("tnd,mnd->ntm", q.to(wide), k.to(wide).repeat_interleave(q.shape[1] // k.shape[1], 1))
    row = torch.arange(q.shape[0], device=q.device)[:, None] + (k.shape[0] - q.shape[0])
    key = torch.arange(k.shape[0], device=q.device)[None, :]
    return (scores / math.sqrt(q.shape[-1])).masked_fill((key > row) | (row - key >= reach), -math.inf)


def _parts(runs: Runs) -> list[tuple[slice, slice]]:
    """Return the rows and the keys of each run."""
    rows, keys = runs.rows.tolist(), runs.keys.tolist()
    return [(slice(*rows[i : i + 2]), slice(*keys[i : i + 2])) for i in range(len(rows) - 1)]


def window_attention_reference(q: Tensor, k: Tensor, v: Tensor, runs: Runs, reach: int) -> tuple[Tensor, Tensor]:
    """Plain twin of `window_attention`, run by run, with all scores of a run at once."""
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
    """Plain twin of `window_attention_backward`, run by run, by the formulas of softmax's gradient."""
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


def _diagonal_scores(q: Tensor, diagonal: Tensor, mask: StepMask) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scaled scores [T, N, steps] of the diagonal keys, and these keys and values [T, N, steps, D]."""
    wide = torch.promote_types(q.dtype, torch.float32)
    seen = diagonal[: mask.step, mask.rows].to(wide).repeat_interleave(q.shape[1] // diagonal.shape[3], 3)
    k, v = (part.permute(1, 2, 0, 3) for part in seen.unbind(2))
    return (q.to(wide)[:, :, None] * k).sum(-1) / math.sqrt(q.shape[-1]), k, v


def merge_diagonal_reference(q: Tensor, diagonal: Tensor, mask: StepMask, out: Tensor, log_sum_exp: Tensor) -> None:
    """Plain twin of `diagonal_keys.merge_diagonal`, with all scores at once."""
    scores, _, v = _diagonal_scores(q, diagonal, mask)
    before = log_sum_exp.t().to(scores.dtype)
    merged = torch.logaddexp(before, scores.logsumexp(-1))
    shares = (scores - merged[..., None]).exp()[..., None]
    out.copy_(out * (before - merged).exp()[..., None] + (shares * v).sum(2))
    log_sum_exp.copy_(merged.t())


def diagonal_gradients_reference(
    upstream: Tensor, result: AttentionResult, q_gradient: Tensor, diagonal_gradient: Tensor
) -> None:
    """Plain twin of `diagonal_keys.diagonal_gradients`, with all scores at once."""
    q, mask = result.q, result.mask
    scores, k, v = _diagonal_scores(q, result.diagonal, mask)
    up = upstream.to(scores.dtype)
    p = (scores - result.log_sum_exp.t()[..., None]).exp()
    delta = (up * result.out).sum(-1)
    ds = p * ((up[:, :, None] * v).sum(-1) - delta[..., None]) / math.sqrt(q.shape[-1])
    q_gradient += (ds[..., None] * k).sum(2).to(q.dtype)
    groups = result.diagonal.shape[3]
    for number, (weights, by) in enumerate(((ds, q), (p, up))):
        gradient = (weights[..., None] * by[:, :, None]).view(by.shape[0], groups, -1, mask.step, by.shape[-1]).sum(2)
        diagonal_gradient[: mask.step, mask.rows, number] += gradient.permute(2, 0, 1, 3).to(diagonal_gradient.dtype)
