"""Mixture-of-experts steps around the grouped matrix products: routing, sorting by expert, relu^2, weighted sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from draftcache.store.common.triton_launch import jit, runs_kernels, tl

_ELEMENTS = 4096


@dataclass(frozen=True)
class Dispatch:
    """Token-expert pairs in the experts' order."""

    tokens: Tensor
    """[N * k] int64: the token of each sorted pair."""
    place: Tensor
    """[N, k] int64: where each of a token's pairs went."""
    ends: Tensor
    """[E] int32: end of each expert's pairs."""


def route(logits: Tensor, bias: Tensor, top_k: int, *, scaling: float, normalise: bool) -> tuple[Tensor, Tensor]:
    """Sigmoid routing with a selection bias: expert ids [N, k] int64 and weights [N, k] float32.

    logits [N, E] float32; bias [E] float32 is added for the choice only. Weights are the chosen scores, divided by
    their sum (+ 1e-20) if `normalise`, times `scaling`. On equal scores the lower id is chosen.
    """
    if not runs_kernels(logits):
        return route_reference(logits, bias, top_k, scaling=scaling, normalise=normalise)
    count, experts = logits.shape
    ids = torch.empty(count, top_k, device=logits.device, dtype=torch.int64)
    weights = torch.empty(count, top_k, device=logits.device, dtype=torch.float32)
    _route_kernel[(count,)](
        logits, bias, ids, weights, experts, scaling, TOP_K=top_k, NORMALISE=normalise,
        BLOCK=1 << (experts - 1).bit_length(), SLOTS=1 << (top_k - 1).bit_length(), num_warps=1,
    )  # fmt: skip
    return ids, weights


def route_reference(
    logits: Tensor, bias: Tensor, top_k: int, *, scaling: float, normalise: bool
) -> tuple[Tensor, Tensor]:
    """See `route`."""
    scores = logits.sigmoid()
    # A stable sort and not topk, whose choice among equal scores is undefined.
    ids = torch.sort(scores + bias, dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(1, ids)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * scaling


def dispatch(ids: Tensor, experts: int) -> Dispatch:
    """Sort the pairs of `ids` [N, k] by expert, tokens in order within each."""
    flat = ids.flatten()
    by_expert, order = torch.sort(flat, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=ids.device)
    # Searched for and not counted: bincount would wait for the device.
    ends = torch.searchsorted(by_expert, torch.arange(experts, device=ids.device), right=True, out_int32=True)
    return Dispatch(tokens=order // ids.shape[1], place=place.view_as(ids), ends=ends)


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows [M, I] of each group times its expert's weight [E, O, I], transposed: [M, O]."""
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        return torch.nn.functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends)
    return grouped_linear_reference(rows, weight, ends)


def grouped_linear_reference(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """See `grouped_linear`."""
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    first = 0
    for expert, last in enumerate(ends.tolist()):
        if last > first:
            torch.mm(rows[first:last], weight[expert].t(), out=out[first:last])
        first = last
    return out


def relu_squared_(values: Tensor) -> Tensor:
    """`relu(x)^2` in place, any contiguous shape."""
    if not runs_kernels(values):
        return relu_squared_reference_(values)
    count = values.numel()
    _relu_squared_kernel[(-(-count // _ELEMENTS),)](values, count, BLOCK=_ELEMENTS, num_warps=8)
    return values


def relu_squared_reference_(values: Tensor) -> Tensor:
    """See `relu_squared_`."""
    return values.relu_().square_()


def combine(expert_rows: Tensor, weights: Tensor, place: Tensor, shared: Tensor) -> Tensor:
    """`sum_j weights[n, j] * expert_rows[place[n, j]]` in float32, rounded, plus `shared`: [N, H], over `shared`."""
    if not runs_kernels(shared):
        return combine_reference(expert_rows, weights, place, shared)
    count, width = shared.shape
    _combine_kernel[(count,)](
        expert_rows, weights, place, shared, width, TOP_K=place.shape[1], BLOCK=1 << (width - 1).bit_length(),
        num_warps=8,
    )  # fmt: skip
    return shared


def combine_reference(expert_rows: Tensor, weights: Tensor, place: Tensor, shared: Tensor) -> Tensor:
    """See `combine`."""
    total = torch.zeros_like(shared, dtype=torch.float32)
    for slot in range(place.shape[1]):
        total += weights[:, slot, None] * expert_rows[place[:, slot]].float()
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
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    value = tl.maximum(tl.load(values + place, mask=inside, other=0.0).to(tl.float32), 0.0)
    tl.store(values + place, (value * value).to(values.dtype.element_ty), mask=inside)


@jit
def _combine_kernel(
    expert_rows,
    weights,
    place,
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
        source = tl.load(place + row * TOP_K + slot)
        factor = tl.load(weights + row * TOP_K + slot)
        total += factor * tl.load(expert_rows + source * width + column, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(shared.dtype.element_ty).to(tl.float32)
    target = shared + row * width + column
    tl.store(target, (rounded + tl.load(target, mask=inside, other=0.0)).to(shared.dtype.element_ty), mask=inside)
