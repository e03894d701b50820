"""Mamba-2's scan and its single step in plain torch, for CPUs: transformers' formulas with fewer passes over memory.

transformers' torch code repeats B and C for every head, lets einsum copy its operands, and expands A and dt to the size
of the state before it takes the exponential. Here matrices are multiplied per group, and exponentials are taken per
head. Letters: B sequences, T tokens, H heads, P head_dim, G groups of J heads, N state size, K chunks of Q tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def chunk_scan(
    x_BTHP: Tensor,
    dt_BTH: Tensor,
    a_H: Tensor,
    b_BTGN: Tensor,
    c_BTGN: Tensor,
    *,
    chunk_size: int,
    D: Tensor | None = None,
    z: None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return y [B, T, H, P] float32 of the recurrence, and with `return_final_states` the last state [B, H, P, N].

    state_t = exp(a dt_t) state_{t-1} + dt_t x_t b_t^T, and y_t = state_t c_t + D x_t. The arguments are those of
    mamba-ssm's `mamba_chunk_scan_combined`; `z` is none, as the gate comes later. All is computed in float32.
    """
    batch, length, heads, width = x_BTHP.shape
    groups, size = b_BTGN.shape[2:]
    dt = dt_BTH.float() if dt_bias is None else dt_BTH.float() + dt_bias.float()
    dt = (functional.softplus(dt) if dt_softplus else dt).clamp(dt_limit[0], dt_limit[1])
    x, b, c = x_BTHP.float(), b_BTGN.float(), c_BTGN.float()
    padding = -length % chunk_size  # padded tokens have dt = 0: they neither decay the state nor add to it
    if padding:
        dt = functional.pad(dt, (0, 0, 0, padding))
        x, b, c = (functional.pad(rows, (0, 0, 0, 0, 0, padding)) for rows in (x, b, c))
    chunks = (length + padding) // chunk_size
    kept = x
    dt_BKQH = dt.view(batch, chunks, chunk_size, heads)
    x_BKQHP = x.reshape(batch, chunks, chunk_size, heads, width) * dt_BKQH[..., None]
    b, c = (rows.reshape(batch, chunks, chunk_size, groups, size).transpose(2, 3) for rows in (b, c))
    c_rows, b_columns = c.reshape(-1, chunk_size, size), b.transpose(3, 4).reshape(-1, size, chunk_size)
    sums_BKHQ = (dt_BKQH * a_H.float()).transpose(2, 3).cumsum(-1)
    y_BKQHP = _within_chunks(x_BKQHP, torch.bmm(c_rows, b_columns), sums_BKHQ, groups)

    # All heads of a group are one product: states are [G, N, JP] here.
    ends_BKQH = (sums_BKHQ[..., -1:] - sums_BKHQ).clamp_(min=_LEAST_DECAY).exp_().transpose(2, 3)
    weighted = (x_BKQHP * ends_BKQH[..., None]).view(batch, chunks, chunk_size, groups, -1).transpose(2, 3)
    added = torch.bmm(b_columns, weighted.reshape(len(b_columns), chunk_size, -1))
    starts_BKQH = sums_BKHQ.clamp(min=_LEAST_DECAY).exp_().transpose(2, 3)
    decay_BKH1 = sums_BKHQ[..., -1:].clamp(min=_LEAST_DECAY).exp_()
    decay = decay_BKH1.expand(-1, -1, -1, width).reshape(batch, chunks, groups, 1, -1)
    before, last = _states(added.view(batch, chunks, groups, size, -1), decay, initial_states)
    seen = torch.bmm(c_rows, before.view(len(c_rows), size, -1)).view(batch, chunks, groups, chunk_size, -1)
    y_BKQHP.addcmul_(seen.transpose(2, 3).reshape(x_BKQHP.shape), starts_BKQH[..., None])
    y = y_BKQHP.view(batch, -1, heads, width)
    if D is not None:
        y.addcmul_(kept, D.float()[:, None])
    y = y[:, :length]
    if not return_final_states:
        return y
    return y, last.view(batch, groups, size, -1, width).permute(0, 1, 3, 4, 2).reshape(batch, heads, width, size)


def _within_chunks(x_BKQHP: Tensor, scores: Tensor, sums_BKHQ: Tensor, groups: int) -> Tensor:
    """Return what the tokens of a chunk give each other, [B, K, Q, H, P]; `scores` [BKG, Q, Q] are c b^T."""
    batch, chunks, chunk_size, heads, width = x_BKQHP.shape
    decay = sums_BKHQ[..., :, None] - sums_BKHQ[..., None, :]
    later = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=decay.device).triu_(1)
    decay.clamp_(_LEAST_DECAY, 0.0).exp_().masked_fill_(later, 0.0)
    mixed = decay.view(batch, chunks, groups, heads // groups, chunk_size, chunk_size)
    mixed.mul_(scores.view(batch, chunks, groups, 1, chunk_size, chunk_size))
    rows = x_BKQHP.transpose(2, 3).reshape(-1, chunk_size, width)
    y = torch.bmm(mixed.view(-1, chunk_size, chunk_size), rows)
    return y.view(batch, chunks, heads, chunk_size, width).transpose(2, 3).contiguous()


_LEAST_DECAY = -60.0
"""exp(-60) = 9e-27 is nothing beside a token's own share, with decay 1, and spares CPUs denormal numbers, which take
them many times as long."""


def _states(added: Tensor, decay: Tensor, first_BHPN: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the state before each chunk, [B, K, G, N, JP], and the last one, [B, G, N, JP]."""
    batch, chunks, groups, size, _ = added.shape
    before = torch.empty_like(added)
    state = torch.zeros_like(added[:, 0])
    if first_BHPN is not None:
        state = first_BHPN.float().reshape(batch, groups, -1, size).transpose(2, 3)
    for number in range(chunks):
        before[:, number] = state
        state = torch.addcmul(added[:, number], state, decay[:, number])
    return before, state


def selective_state_update(
    state_BHPN: Tensor,
    x_BHP: Tensor,
    dt_BHP: Tensor,
    a_HPN: Tensor,
    b_BGN: Tensor,
    c_BGN: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    z: Tensor | None = None,
) -> Tensor:
    """Advance the state by one token, in place, and return y [B, H, P] in x's dtype.

    Along P and N, `dt_BHP`, `a_HPN`, `dt_bias` are one value per head that was expanded, as Mamba-2 has it. `z` is
    none. The operations are transformers', in its order: only exponentials may differ in their last bit.
    """
    heads = x_BHP.shape[1]
    dt = dt_BHP[..., 0]
    if dt_bias is not None:
        dt = dt + dt_bias[..., 0].to(dt.dtype)
    if dt_softplus:
        dt = functional.softplus(dt)
    decay = torch.exp(dt.float() * a_HPN[:, 0, 0].float())
    b, c = (rows.repeat_interleave(heads // rows.shape[1], dim=1) for rows in (b_BGN, c_BGN))
    added = (dt[..., None] * b)[:, :, None, :] * x_BHP[..., None]
    state_BHPN.mul_(decay[..., None, None]).add_(added)
    flat = state_BHPN.to(c.dtype).reshape(-1, *state_BHPN.shape[2:])
    out = torch.bmm(flat, c.reshape(flat.shape[0], -1, 1)).view(x_BHP.shape)
    return (out if D is None else out + x_BHP * D).to(x_BHP.dtype)
