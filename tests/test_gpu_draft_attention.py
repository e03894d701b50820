"""The unroll's attention kernels, and the whole pass through all kernels, beside plain twins in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from draftcache.draft_train.drafts.eagle3.fused_pass import FusedPass
from draftcache.draft_train.drafts.eagle3.kernels.attention import (
    attend,
    attend_backward,
    attend_backward_reference,
    attend_reference,
)
from draftcache.draft_train.drafts.eagle3.kernels.flash_attention import why_not_flash
from draftcache.draft_train.drafts.eagle3.kernels.runs import find_runs
from draftcache.draft_train.drafts.eagle3.kernels.step_mask import StepMask
from draftcache.draft_train.drafts.eagle3.model import Eagle3Model
from draftcache.draft_train.loss.objective import Objective
from support.draft_batches import MASKS, batch_of
from support.draft_models import embeddings, make_model
from support.gradient_passes import SMALL, config, near, objective, plain_pass, run
from support.kernel_device import BF16, BOUND, DEVICE, DTYPES, F32, INTERPRETED, MARKS, error, rand
from support.synthetic import VOCAB, vocab_map

pytestmark = MARKS

NEEDS_FLASH = pytest.mark.skipif(
    not INTERPRETED and (not torch.cuda.is_available() or why_not_flash(128, DEVICE) is not None),
    reason="needs FlashAttention 4",
)
"""In the interpreter its plain twin takes its place, beside the kernels of rows' own keys."""


STEPS_TRIED = [0, 5] if INTERPRETED else [0, 1, 5]


def mask_of(positions: torch.Tensor, key_positions: torch.Tensor, step: int, window: int, slots: int) -> StepMask:
    rows = torch.arange(slots, device=DEVICE)[-positions.numel() :]
    return StepMask(rows, positions.to(DEVICE, torch.int32), key_positions.to(DEVICE, torch.int32), step, window)


ROWS = 150 if INTERPRETED else 1000
HEADS = [(4, 2, 16)] if INTERPRETED else [(8, 2, 64), (32, 2, 128)]


def cases() -> dict[str, tuple[torch.Tensor, torch.Tensor, int]]:
    """Query positions, key positions, window."""
    every = torch.arange(ROWS)
    tenth, window = ROWS // 10, 3 * ROWS // 10
    holes = every[(every % 7 != 3) & ~((every > 3 * tenth) & (every < 42 * ROWS // 100))]
    pieces = ((0, ROWS // 11), (4 * tenth, ROWS // 3), (11 * tenth, 5), (15 * tenth, 4 * tenth))
    packed = torch.cat([first + torch.arange(length) for first, length in pieces])
    return {
        "all rows": (every, every, window),
        "turns": (torch.cat((every[tenth : 26 * ROWS // 100], every[5 * tenth : 9 * tenth])), every, window),
        "holes": (holes[2 * tenth // 5 :: 2], holes, 64),
        "packed": (packed[packed % 3 > 0], packed, 256 * ROWS // 1000),
        "whole": (every[::3], every, 5 * ROWS),
        "narrow": (every, every, 8),
        "few": (every[-3:], every, window),
    }


def require_attention(mask: StepMask, heads: int, groups: int, width: int, dtype: torch.dtype, bound: float) -> None:
    """Output, log-sum-exp and all gradients are those of the dense reference in float64, and the same every time."""
    rows, keys, slots = mask.positions.numel(), mask.key_positions.numel(), int(mask.rows[-1]) + 1
    q = (2 * rand(rows, heads, width)).to(dtype)  # logits of tens: where gradients of the LSE matter
    kv, own = rand(keys, 2, groups, width, dtype=dtype), rand(5, slots, 2, groups, width, dtype=dtype)
    held = attend(q, kv, own, mask)
    out = held.out.clone()  # its memory may be taken
    wide = [value.double() for value in (q, kv, own)]
    plain = replace(mask, runs=None)
    expected = attend_reference(*wide, plain)
    assert error(out, expected.out) < bound
    torch.testing.assert_close(
        held.log_sum_exp.double(), expected.log_sum_exp, rtol=1e-3, atol=1e-3 if dtype == F32 else 2e-2
    )
    given = rand(*q.shape, dtype=dtype)
    sums = [torch.zeros_like(value, dtype=F32) for value in (kv, own)]
    wide_sums = [torch.zeros_like(value) for value in wide[1:]]
    found = attend_backward(given, held, *sums)
    expected_q = attend_backward_reference(given.double(), expected, *wide_sums)
    assert error(found, expected_q) < 2 * bound
    for ours, theirs in zip(sums, wide_sums, strict=True):
        assert error(ours, theirs) < 2 * bound
    if not INTERPRETED:  # which runs one program after the other
        again_sums = [torch.zeros_like(part) for part in sums]
        again = attend_backward(given, attend(q, kv, own, mask), *again_sums)
        assert all(torch.equal(one, two) for one, two in zip((found, *sums), (again, *again_sums), strict=True))
    if mask.step:  # negative control: rows that see one key more are told apart
        wider = attend_reference(*wide, replace(plain, window=mask.window + mask.step))
        assert mask.window > keys or error(wider.out, expected.out) > BOUND[F32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("step", STEPS_TRIED)
@pytest.mark.parametrize(("heads", "groups", "width"), HEADS)
@pytest.mark.parametrize("name", cases())
def test_attention(name: str, heads: int, groups: int, width: int, step: int, dtype: torch.dtype) -> None:
    positions, key_positions, window = cases()[name]
    mask = mask_of(positions, key_positions, step, window, positions.numel() + 9)
    require_attention(mask, heads, groups, width, dtype, BOUND[dtype])


@NEEDS_FLASH
@pytest.mark.parametrize("step", STEPS_TRIED)
@pytest.mark.parametrize(("heads", "groups", "width"), HEADS)
@pytest.mark.parametrize("name", [*(name for name in cases() if name != "holes"), "close turns"])
def test_flash_attention(name: str, heads: int, groups: int, width: int, step: int) -> None:
    every = torch.arange(ROWS)
    close = every[every % 16 > 5], every, ROWS // 5  # a key is seen by several runs
    positions, key_positions, window = {**cases(), "close turns": close}[name]
    mask = mask_of(positions, key_positions, step, window, positions.numel() + 9)
    runs = find_runs(positions.numpy(), key_positions.numpy(), step, window, DEVICE, most_copies=1000)
    assert runs is not None
    assert (runs.copies > 1) == (name in ("turns", "packed", "whole", "close turns")), runs.copies
    dtype = F32 if INTERPRETED else BF16
    require_attention(replace(mask, runs=runs), heads, groups, width, dtype, BOUND[dtype])


@pytest.mark.parametrize("flash", [False, pytest.param(True, marks=NEEDS_FLASH)])
def test_attention_of_groups_of_three_heads(flash: bool) -> None:
    positions, key_positions, window = cases()["turns"]
    mask = mask_of(positions, key_positions, 3, window, positions.numel() + 9)
    if flash:
        mask = replace(mask, runs=find_runs(positions.numpy(), key_positions.numpy(), 3, window, DEVICE))
    dtype = F32 if INTERPRETED else BF16
    require_attention(mask, 6, 2, 16 if INTERPRETED else 64, dtype, BOUND[dtype])


@pytest.mark.parametrize(
    "flash", [False, pytest.param(True, marks=[NEEDS_FLASH, *([pytest.mark.slow] if INTERPRETED else [])])]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_whole_pass_through_its_kernels_equals_autograd_in_float64(dtype: torch.dtype, flash: bool) -> None:
    if flash and dtype == F32 and not INTERPRETED:
        pytest.skip("FlashAttention takes no float32")
    bound = {F32: 1e-5, BF16: 6e-2}[dtype]
    shape = replace(make_model().shape, head_dim=64 if flash else 16, sliding_window=37)
    expected_model = Eagle3Model(shape)
    expected_model.initialize(0)
    with torch.no_grad():
        for value in expected_model.parameters():
            value.mul_(8.0) if value.ndim == 2 else value.add_(0.3 * torch.randn(value.shape))
    model = Eagle3Model(shape).to(DEVICE)
    model.load_state_dict(expected_model.state_dict())
    batch = batch_of(list(MASKS), 37)
    expected = run(plain_pass(expected_model.double(), objective(), embeddings()), expected_model, batch)
    words = vocab_map()
    there = Objective(
        config(), torch.from_numpy(words.target_ids).to(DEVICE), torch.from_numpy(words.padded(VOCAB).t2d).to(DEVICE)
    )
    settings = replace(SMALL, flash_attention=flash)
    training = FusedPass(model, there, embeddings().float().to(DEVICE), settings, dtype=dtype)
    found = run(training, model, batch.to(DEVICE))
    torch.testing.assert_close(found[0][0].cpu(), expected[0][0], rtol=bound, atol=0)
    assert near({name: value.cpu().double() for name, value in found[1].items()}, expected[1], bound)
    if not INTERPRETED:  # which runs one operation after the other
        again = run(training, model, batch.to(DEVICE))
        assert all(torch.equal(again[1][name], value) for name, value in found[1].items())


@pytest.mark.skipif(INTERPRETED, reason="there is no device to wait for")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("flash", [False, pytest.param(True, marks=NEEDS_FLASH)])
def test_the_pass_waits_for_nothing(flash: bool) -> None:
    model = Eagle3Model(replace(make_model().shape, head_dim=64)).to(DEVICE)
    words = vocab_map()
    there = Objective(
        config(), torch.from_numpy(words.target_ids).to(DEVICE), torch.from_numpy(words.padded(VOCAB).t2d).to(DEVICE)
    )
    training = FusedPass(
        model, there, embeddings().float().to(DEVICE), replace(SMALL, flash_attention=flash), dtype=BF16
    )
    batch = batch_of(list(MASKS), 37).to(DEVICE)
    training(batch)  # what is made once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        training(batch)
        with pytest.raises(RuntimeError, match="synchronizing"):
            torch.nonzero(batch.steps)  # negative control
    finally:
        torch.cuda.set_sync_debug_mode("default")
