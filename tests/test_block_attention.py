"""The plain attention of block drafts: the definition beside loops over keys, and slices beside the definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from draftcache.draft_train.drafts.block import block_attention as plain
from draftcache.draft_train.drafts.block.block_attention import block_attention, dense_block_attention
from draftcache.draft_train.drafts.block.kernels.attention import (
    attend_blocks,
    attend_blocks_backward,
    attend_blocks_backward_reference,
)
from draftcache.draft_train.drafts.block.kernels.block_mask import BlockMask, block_spans
from support.block_masks import Operands, block_mask, draw_operands, packed_positions

pytestmark = pytest.mark.usefixtures("seeded")

LENGTHS = (9, 1, 14, 6)
STARTS = torch.tensor([0, 3, 8, 9, 10, 17, 23, 24, 29])
SHAPE = (5, 6, 2, 8)
"""Slots, heads, groups and width of operands."""
WINDOWS = [1, 3, 5, 8, 12, 40]
Attention = Callable[..., Tensor]


def mask_of(window: int, causal: bool = True) -> BlockMask:
    return block_mask(packed_positions(LENGTHS, window), STARTS, window, causal)


def seen_by_loops(window: int, causal: bool, slots: int) -> tuple[list[list[set[int]]], list[set[int]]]:
    """Context rows that each slot of each block sees, and slots that each slot sees, by going through conversations."""
    places = [(talk, row) for talk, length in enumerate(LENGTHS) for row in range(length)]
    context = []
    for talk, start in (places[row] for row in STARTS.tolist()):
        context.append([set[int]() for _ in range(slots)])
        for slot in range(slots):
            for number, (other, row) in enumerate(places):
                if other == talk and row <= start and start + 1 + slot - row < window:
                    context[-1][slot].add(number)
    own = [{i for i in range(slots) if abs(i - j) < window and (i <= j or not causal)} for j in range(slots)]
    return context, own


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", WINDOWS)
def test_what_is_seen_is_what_loops_over_conversations_find(window: int, causal: bool) -> None:
    mask, slots = mask_of(window, causal), SHAPE[0]
    context, own = seen_by_loops(window, causal, slots)
    seen = mask.context_seen(slots)
    assert [[set(row.nonzero().flatten().tolist()) for row in block] for block in seen] == context
    assert [set(row.nonzero().flatten().tolist()) for row in mask.slots_seen(slots)] == own
    low, high = mask.context_range(slots)
    assert [[set(range(a, b)) for a in row] for row, b in zip(low.tolist(), high.tolist(), strict=True)] == context
    # negative control: conversations one position closer, so that one's first slot sees the last row of the other
    near = mask.positions - torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).int()
    closer = block_mask(near, STARTS, window, causal)
    assert window == 1 or not torch.equal(closer.context_seen(slots), seen)


@pytest.mark.parametrize("tile", [1, 4, 7, 64])
@pytest.mark.parametrize("window", WINDOWS)
def test_spans_of_blocks_bound_those_that_see_a_tile(window: int, tile: int) -> None:
    mask = mask_of(window)
    seen, rows = mask.context_seen(SHAPE[0]), sum(LENGTHS)
    spans = block_spans(*mask.context_range(SHAPE[0]), rows, tile)
    assert spans.shape == (4, -(-rows // tile))
    for number, (first, whole_first, whole_last, last) in enumerate(spans.T.tolist()):
        part = seen[:, :, number * tile : (number + 1) * tile].flatten(1)
        assert set(part.any(1).nonzero().flatten().tolist()) <= set(range(first, last))
        assert set(range(whole_first, whole_last)) == set(part.all(1).nonzero().flatten().tolist())


def test_ranges_never_wait_for_the_device() -> None:
    """A tensor of the meta device has no values, so whatever would read one fails."""
    mask = mask_of(8)
    there = BlockMask(mask.start_rows.to("meta"), mask.start_positions.to("meta"), mask.positions.to("meta"), 8, True)
    low, high = there.context_range(5)
    assert block_spans(low, high, sum(LENGTHS), 4).shape == (4, 8)
    assert there.part(slice(2, 4)).context_range(5)[0].shape == (2, 5)
    with pytest.raises((RuntimeError, NotImplementedError)):
        low.tolist()


@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [1, 3, 8, 40])
def test_the_definition_equals_loops_over_keys(window: int, causal: bool, sinks: bool) -> None:
    mask = mask_of(window, causal)
    operands = draw_operands(mask, *SHAPE, torch.float64, sinks)
    q, context_kv, block_kv, logits = operands
    context, own = seen_by_loops(window, causal, SHAPE[0])
    expected = torch.zeros_like(q)
    for block in range(q.shape[0]):
        for slot in range(SHAPE[0]):
            for head in range(SHAPE[1]):
                group = head // (SHAPE[1] // SHAPE[2])
                keys = [context_kv[row, :, group] for row in context[block][slot]]
                keys += [block_kv[block, other, :, group] for other in own[slot]]
                shares = [torch.exp(q[block, slot, head] @ k / math.sqrt(SHAPE[3])) for k, _ in keys]
                total = sum(shares, torch.zeros(())) + (0.0 if logits is None else torch.exp(logits[head]))
                parts = zip(shares, keys, strict=True)
                expected[block, slot, head] = sum((p / total * v for p, (_, v) in parts), torch.zeros(SHAPE[3]))
    torch.testing.assert_close(dense_block_attention(*operands[:3], mask, logits), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("changed", ["window + 1", "window - 1", "causal", "sinks"])
def test_every_rule_of_the_mask_shows_in_the_result(changed: str) -> None:
    mask = mask_of(8)
    q, context_kv, block_kv, sinks = draw_operands(mask, *SHAPE, torch.float64)
    expected = dense_block_attention(q, context_kv, block_kv, mask, sinks)
    other = {
        "window + 1": replace(mask, window=9),
        "window - 1": replace(mask, window=7),
        "causal": replace(mask, causal=False),
        "sinks": mask,
    }[changed]
    found = dense_block_attention(q, context_kv, block_kv, other, None if changed == "sinks" else sinks)
    assert float((found - expected).abs().max()) > 1e-3


def gradients(attention: Attention, operands: Operands, mask: BlockMask, upstream: Tensor) -> list[Tensor]:
    """The output and the gradients of all operands."""
    leaves = [None if part is None else part.clone().requires_grad_() for part in operands]
    out = attention(*leaves[:3], mask, leaves[3])
    there = [part for part in leaves if part is not None]
    return [out.detach(), *torch.autograd.grad(out, there, upstream)]


@pytest.mark.parametrize("kept", [plain.KEPT_SCORES, 0])
@pytest.mark.parametrize("sinks", [True, False])
@pytest.mark.parametrize(("window", "causal"), [(3, True), (8, False), (12, True), (10**12, False)])
def test_slices_equal_the_definition(
    window: int, causal: bool, sinks: bool, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plain, "SLICE_SLOTS", 14)  # two blocks, of which 9 leave one over
    monkeypatch.setattr(plain, "KEPT_SCORES", kept)
    reached: list[int] = []

    def watched(q: Tensor, context_kv: Tensor, *rest: object) -> Tensor:
        reached.append(context_kv.shape[0])
        return dense_block_attention(q, context_kv, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(plain, "dense_block_attention", watched)
    mask = mask_of(window, causal) if window < 1000 else block_mask(torch.arange(30), STARTS, window, causal)
    operands = draw_operands(mask, *SHAPE, torch.float64, sinks)
    upstream = torch.randn_like(operands[0])
    expected = gradients(dense_block_attention, operands, mask, upstream)
    found = gradients(block_attention, operands, mask, upstream)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert len(reached) == (5 if kept else 10)  # recomputed in the backward pass
    assert window > 8 or max(reached) < sum(LENGTHS) // 2


def test_no_block_is_no_output() -> None:
    mask = block_mask(packed_positions(LENGTHS, 8), STARTS[:0], 8, True)
    operands = draw_operands(mask, *SHAPE, torch.float64)
    out, *found = gradients(block_attention, operands, mask, torch.zeros(0, 5, 6, 8, dtype=torch.float64))
    assert out.shape == (0, 5, 6, 8)
    assert not any(part.any() for part in found)


def test_the_twin_has_the_gradients_of_the_definition_and_adds_those_of_context() -> None:
    mask = mask_of(8)
    operands = draw_operands(mask, *SHAPE, torch.float64)
    upstream = torch.randn_like(operands[0])
    expected = gradients(dense_block_attention, operands, mask, upstream)
    context_gradient = torch.ones_like(operands[1])
    result = attend_blocks(*operands[:3], mask, operands[3])
    found = attend_blocks_backward(upstream, result, context_gradient)
    for ours, theirs in zip((result.out, found[0], context_gradient - 1, *found[1:]), expected, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    shares = torch.exp(operands[3] - result.log_sum_exp) if operands[3] is not None else None
    assert shares is not None  # the kernels' rule for sinks, which needs no scores
    by_rule = -(shares * (upstream * result.out).sum(-1)).sum((0, 1))
    torch.testing.assert_close(by_rule, expected[4], rtol=1e-10, atol=1e-12)
    without = replace(result, sinks=None)
    assert attend_blocks_backward_reference(upstream, without, context_gradient)[2] is None
