"""The kernels of block attention beside their plain twins in float64: values and all gradients."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from draftcache.draft_train.drafts.block.kernels import key_gradients
from draftcache.draft_train.drafts.block.kernels.attention import (
    attend_blocks,
    attend_blocks_backward,
    attend_blocks_backward_reference,
    attend_blocks_reference,
)
from draftcache.draft_train.drafts.block.kernels.block_mask import BlockMask
from support.block_masks import Operands, block_mask, draw_operands, in_float64, packed_positions
from support.kernel_device import BOUND, DEVICE, DTYPES, F32, INTERPRETED, MARKS, error, rand

pytestmark = MARKS

SCALE = 1 if INTERPRETED else 12
"""How much longer conversations and windows are on a GPU, whose tiles are four times as high."""
WIDTHS = [16] if INTERPRETED else [64, 128]


@dataclass(frozen=True)
class Case:
    """A mask and the shape of its operands, in rows of the interpreted size."""

    lengths: tuple[int, ...]
    every: int
    """Every so many rows is a start row."""
    window: int
    slots: int
    heads: int
    groups: int
    causal: bool = True
    sinks: bool = True

    def mask(self) -> BlockMask:
        window = self.window * SCALE if self.window > 8 else self.window  # 8 or less: within a block
        positions = packed_positions([length * SCALE for length in self.lengths], window)
        return block_mask(positions, torch.arange(2, positions.numel(), self.every), window, self.causal, DEVICE)

    def operands(self, width: int, dtype: torch.dtype) -> Operands:
        return draw_operands(self.mask(), self.slots, self.heads, self.groups, width, dtype, self.sinks)


CASES = {
    "packed": Case((60, 3, 38), 4, 37, 5, 4, 2),
    "window inside a block": Case((30, 12), 3, 3, 7, 3, 1, causal=False),
    "window of everything": Case((75,), 5, 10**6, 8, 4, 1, causal=False, sinks=False),
    "block over several tiles": Case((45,), 8, 20, 20, 8, 1),
    "far apart": Case((140,), 65, 9, 5, 6, 2, sinks=False),
    "one block": Case((40,), 1000, 10**6, 16, 1, 1),
}


def everything(operands: Operands, mask: BlockMask, upstream: Tensor, start: Tensor) -> list[Tensor]:
    """Output, log-sum-exp, and gradients of queries, context (added to `start`), blocks and sinks, by the kernels."""
    result = attend_blocks(*operands[:3], mask, operands[3])
    total = start.clone()
    q_gradient, block_gradient, sink_gradient = attend_blocks_backward(upstream, result, total)
    found = [result.out, result.log_sum_exp, q_gradient, total, block_gradient]
    return found if sink_gradient is None else [*found, sink_gradient]


def expected_of(operands: Operands, mask: BlockMask, upstream: Tensor, start: Tensor) -> list[Tensor]:
    """The same by the plain twins in float64."""
    q, context_kv, block_kv, sinks = in_float64(operands)
    result = attend_blocks_reference(q, context_kv, block_kv, mask, sinks)
    total = start.double()
    gradients = attend_blocks_backward_reference(upstream.double(), result, total)
    found = [result.out, result.log_sum_exp, gradients[0], total, gradients[1]]
    return found if gradients[2] is None else [*found, gradients[2]]


def start_of(operands: Operands) -> Tensor:
    """What gradients of context are added to."""
    return rand(*operands[1].shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_their_twins(name: str, width: int, dtype: torch.dtype) -> None:
    case = CASES[name]
    mask, operands = case.mask(), case.operands(width, dtype)
    upstream, start = rand(*operands[0].shape, dtype=dtype), start_of(operands)
    found = everything(operands, mask, upstream, start)
    expected = expected_of(operands, mask, upstream, start)
    for ours, theirs in zip(found, expected, strict=True):
        assert error(ours, theirs) < 2 * BOUND[dtype]
    assert [part.dtype for part in found] == [dtype, F32, dtype, F32, dtype, F32][: len(found)]
    seen = mask.context_seen(case.slots).flatten(0, 1).any(0)
    assert torch.equal(found[3][~seen], start[~seen])
    assert error(found[3][seen], start[seen]) > BOUND[dtype]
    assert not seen.all(), "the case has no row that nobody sees"


@pytest.mark.parametrize("changed", ["window", "causal", "sinks"])
def test_a_broken_rule_would_be_noticed(changed: str) -> None:
    """The negative control of the test above, on the kernels' side."""
    case = CASES["packed"]
    mask, operands = case.mask(), case.operands(WIDTHS[0], F32)
    q, context_kv, block_kv, sinks = operands
    expected = attend_blocks_reference(*in_float64((q, context_kv, block_kv, sinks))[:3], mask, sinks.double()).out
    other = BlockMask(
        mask.start_rows,
        mask.start_positions,
        mask.positions,
        mask.window + (changed == "window"),
        mask.causal != (changed == "causal"),
    )
    found = attend_blocks(q, context_kv, block_kv, other, None if changed == "sinks" else sinks).out
    assert error(found, expected) > 100 * BOUND[F32]


def test_parts_of_a_long_run_add_up_and_are_the_same_bits_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((40, 13), 4, 20, 5, 2, 1)
    mask, operands = case.mask(), case.operands(WIDTHS[0], F32)
    upstream, start = rand(*operands[0].shape), start_of(operands)
    result = attend_blocks(*operands[:3], mask, operands[3])
    monkeypatch.setattr(key_gradients, "_LEAST_TILES", 10**9)
    assert key_gradients._part_count(result, 32, 32) == 1
    whole = everything(operands, mask, upstream, start)
    monkeypatch.setattr(key_gradients, "_LEAST_TILES", 1)
    monkeypatch.setattr(key_gradients, "_PROGRAMS", 10**6)
    assert key_gradients._part_count(result, 32, 32) > 2
    parts = everything(operands, mask, upstream, start)
    again = everything(operands, mask, upstream, start)
    assert error(parts[3], whole[3]) < BOUND[F32]
    assert all(torch.equal(one, other) for one, other in zip(parts, again, strict=True))


def test_slices_of_the_blocks_add_up_to_one_call() -> None:
    case = CASES["packed"]
    mask, operands = case.mask(), case.operands(WIDTHS[0], F32)
    q, context_kv, block_kv, sinks = operands
    upstream, start = rand(*q.shape), start_of(operands)
    expected = everything(operands, mask, upstream, start)
    total, slices = start, []
    for taken in (slice(0, 9), slice(9, 9), slice(9, 14), slice(14, None)):
        part = (q[taken], context_kv, block_kv[taken], sinks)
        slices.append(everything(part, mask.part(taken), upstream[taken], total))
        total = slices[-1][3]
    assert error(total, expected[3]) < BOUND[F32]
    for number in (0, 1, 2, 4):
        assert error(torch.cat([part[number] for part in slices]), expected[number]) < BOUND[F32]
    assert error(sum(part[5] for part in slices), expected[5]) < BOUND[F32]


def test_no_block_adds_nothing() -> None:
    case = CASES["packed"]
    mask, (q, context_kv, block_kv, sinks) = case.mask(), case.operands(WIDTHS[0], F32)
    start = rand(*context_kv.shape)
    none = slice(0, 0)
    found = everything((q[none], context_kv, block_kv[none], sinks), mask.part(none), q[none], start)
    assert torch.equal(found[3], start)
    assert not found[5].any()
    assert [len(found[number]) for number in (0, 1, 2, 4)] == [0, 0, 0, 0]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter reads values on the host")
def test_the_host_never_waits_for_the_gpu() -> None:
    case = CASES["packed"]
    mask, operands = case.mask(), case.operands(WIDTHS[0], F32)
    upstream, start = rand(*operands[0].shape), start_of(operands)
    everything(operands, mask, upstream, start)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(operands, mask, upstream, start)
    finally:
        torch.cuda.set_sync_debug_mode("default")
