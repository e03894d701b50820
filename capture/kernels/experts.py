"""Mixture-of-experts steps around the grouped matrix products: routing, sorting by expert, relu^2, weighted sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draftcache.store.common.triton_launch import jit, power_of_two, runs_kernels, tl

_ELEMENTS = 4096


@dataclass(frozen=True)
class Dispatch:
    """The pairs of a token and an expert that it was routed to, sorted by expert."""

    tokens: Tensor
    """[N * k] int64: the token of each sorted pair."""
    pair_rows: Tensor
    """[N, k] int64: the rows of each token's pairs among the sorted ones."""
    ends: Tensor
    """[E] int32: one past the last row of each expert's pairs."""


def route(logits: Tensor, bias: Tensor, top_k: int, *, scaling: float, normalise: bool) -> tuple[Tensor, Tensor]:
    """Sigmoid routing with a selection bias: returns expert ids [N, k] int64 and weights [N, k] float32.

    logits [N, E] float32; bias [E] float32 is added for the choice only. Weights are the chosen scores, divided by
    their sum (+ 1e-20) if `normalise`, times `scaling`. Of equal scores the one with the lower id is chosen.
    """
    if not runs_kernels(logits):
        return route_reference(logits, bias, top_k, scaling=scaling, normalise=normalise)
    count, experts = logits.shape
    ids = torch.empty(count, top_k, device=logits.device, dtype=torch.int64)
    weights = torch.empty(count, top_k, device=logits.device, dtype=torch.float32)
    _route_kernel[(count,)](
        logits, bias, ids, weights, experts, scaling, TOP_K=top_k, NORMALISE=normalise,
        BLOCK=power_of_two(experts), SLOTS=power_of_two(top_k), num_warps=1,
    )  # fmt: skip
    return ids, weights


def route_reference(
    logits: Tensor, bias: Tensor, top_k: int, *, scaling: float, normalise: bool
) -> tuple[Tensor, Tensor]:
    """Plain twin of `route`."""
    scores = logits.sigmoid()
    # A stable sort, since topk's choice among equal scores is undefined.
    ids = torch.sort(scores + bias, dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, ids)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * scaling


def dispatch(ids: Tensor, experts: int) -> Dispatch:
    """Sort the pairs of `ids` [N, k] by expert, and by token within each expert."""
    flat = ids.flatten()
    by_expert, order = torch.sort(flat, stable=True)
    pair_rows = torch.empty_like(order)
    pair_rows[order] = torch.arange(order.numel(), device=ids.device)
    # The ends are searched for, since counting with bincount would wait for the device.
    ends = torch.searchsorted(by_expert, torch.arange(experts, device=ids.device), right=True, out_int32=True)
    return Dispatch(tokens=order // ids.shape[1], pair_rows=pair_rows.view_as(ids), ends=ends)


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply each expert's rows of `rows` [M, I] by its transposed weight of `weight` [E, O, I]: [M, O].

    `ends` [E] int32 as in `Dispatch`.
    """
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        return torch.nn.functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    return grouped_linear_reference(rows, weight, ends)


def grouped_linear_reference(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Plain twin of `grouped_linear`: one product per expert; it waits for the device to read `ends`."""
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    first = 0
    for expert, last in enumerate(ends.tolist()):
        if last > first:
            torch.mm(rows[first:last], weight[expert].t(), out=out[first:last])
        first = last
    return out


def relu_squared_(values: Tensor) -> Tensor:
    """`relu(x)^2`, in place, of a contiguous tensor of any shape."""
    if not runs_kernels(values):
        return relu_squared_reference_(values)
    count = values.numel()
    _relu_squared_kernel[(-(-count // _ELEMENTS),)](values, count, BLOCK=_ELEMENTS, num_warps=8)
    return values


def relu_squared_reference_(values: Tensor) -> Tensor:
    """Plain twin of `relu_squared_`."""
    return values.relu_().square_()


def combine(expert_rows: Tensor, weights: Tensor, pair_rows: Tensor, shared: Tensor) -> Tensor:
    """`sum_j weights[n, j] * expert_rows[pair_rows[n, j]]` in float32, rounded, plus `shared` [N, H].

    expert_rows [N * k, H], weights and pair_rows [N, k] of `route` and `dispatch`. The result overwrites `shared`.
    """
    if not runs_kernels(shared):
        return combine_reference(expert_rows, weights, pair_rows, shared)
    count, width = shared.shape
    _combine_kernel[(count,)](
        expert_rows, weights, pair_rows, shared, width, TOP_K=pair_rows.shape[1], BLOCK=power_of_two(width),
        num_warps=8,
    )  # fmt: skip
    return shared


def combine_reference(expert_rows: Tensor, weights: Tensor, pair_rows: Tensor, shared: Tensor) -> Tensor:
    """Plain twin of `combine`; it leaves `shared` as it is."""
    total = torch.zeros_like(shared, dtype=torch.float32)
    for slot in range(pair_rows.shape[1]):
        total += weights[:, slot, None] * expert_rows[pair_rows[:, slot]].float()
    return total.to(shared.dtype) + shared


@jit
def _route_kernel(
    logits, bias, ids, weights, experts, scaling,
    TOP_K: tl.constexpr, NORMALISE: tl.constexpr, BLOCK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    known = expert < experts
    logit = tl.load(logits + row * experts + expert, mask=known, other=0.0)
    score = 1.0 / (1.0 + tl.exp(-logit))
    choice = tl.where(known, score + tl.load(bias + expert, mask=known, other=0.0), float("-inf"))
    slot = tl.arange(0, SLOTS)
    chosen = tl.zeros((SLOTS,), tl.int32)
    picked = tl.zeros((SLOTS,), tl.float32)
    for number in tl.static_range(TOP_K):
        best = tl.max(choice, 0)
        first = tl.min(tl.where(choice == best, expert, BLOCK), 0)
        value = tl.sum(tl.where(expert == first, score, 0.0), 0)
        chosen = tl.where(slot == number, first, chosen)
        picked = tl.where(slot == number, value, picked)
        choice = tl.where(expert == first, float("-inf"), choice)
    if NORMALISE:
        picked = picked / (tl.sum(picked, 0) + 1e-20)
    wanted = slot < TOP_K
    tl.store(ids + row * TOP_K + slot, chosen.to(tl.int64), mask=wanted)
    tl.store(weights + row * TOP_K + slot, picked * scaling, mask=wanted)


@jit
def _relu_squared_kernel(values, count, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = element < count
    value = tl.maximum(tl.load(values + element, mask=inside, other=0.0).to(tl.float32), 0.0)
    tl.store(values + element, (value * value).to(values.dtype.element_ty), mask=inside)


@jit
def _combine_kernel(
    expert_rows,
    weights,
    pair_rows,
    shared,
    width,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(TOP_K):
        source = tl.load(pair_rows + row * TOP_K + slot)
        factor = tl.load(weights + row * TOP_K + slot)
        total += factor * tl.load(expert_rows + source * width + column, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(shared.dtype.element_ty).to(tl.float32)
    target = shared + row * width + column
    tl.store(target, (rounded + tl.load(target, mask=inside, other=0.0)).to(shared.dtype.element_ty), mask=inside)
