"""The draft's kernels beside their plain twins, values and gradients, in the dtypes and shapes that they run in."""

from __future__ import annotations

import pytest
import torch

from draftcache.draft_train.kernels.normed_heads import (
    HeadNorms,
    normed_heads_backward,
    normed_heads_backward_reference,
    split_normed_heads,
    split_normed_heads_reference,
)
from draftcache.draft_train.kernels.norms import (
    rms_norm,
    rms_norm_backward,
    rms_norm_backward_reference,
    rms_norm_reference,
)
from draftcache.draft_train.kernels.rotary import (
    join_heads,
    join_heads_reference,
    rotary_table,
    split_heads,
    split_heads_reference,
)
from draftcache.draft_train.kernels.swiglu import swiglu, swiglu_backward_, swiglu_backward_reference_, swiglu_reference
from draftcache.draft_train.loss.kernels.ce_l1 import ce_l1
from draftcache.draft_train.loss.kernels.tail_kl import tail_kl, tail_kl_reference
from draftcache.draft_train.loss.row_losses import RowTeacher, ce_l1_loss
from draftcache.store.common.triton_launch import INTERPRETED
from support.kernel_device import BOUND, DEVICE, DTYPES, MARKS, error, rand

pytestmark = MARKS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (37, 2688), (280 if INTERPRETED else 1500, 260)])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("some", [False, True])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, int], residual: bool, some: bool) -> None:
    x, weight, given = rand(shape[0] + 5 * some, shape[1], dtype=dtype), rand(shape[1]), rand(*shape, dtype=dtype)
    kept = torch.randperm(len(x), device=DEVICE)[: shape[0]] if some else None
    added = rand(*shape, dtype=dtype) if residual else None
    normed = rms_norm_reference(x.double(), weight.double(), 1e-5, kept)
    assert error(rms_norm(x, weight, 1e-5, kept), normed) < BOUND[dtype]
    sums, expected_sums = rand(shape[1]), None
    expected_sums = sums.double()
    found = rms_norm_backward(given, x, weight, 1e-5, sums, added, kept)
    wide = None if added is None else added.double()
    expected = rms_norm_backward_reference(given.double(), x.double(), weight.double(), 1e-5, expected_sums, wide, kept)
    assert error(found, expected) < BOUND[dtype]
    assert error(sums, expected_sums) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 6), (37, 8064), (300, 1025)])
def test_swiglu(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    gate_up, given = rand(shape[0], 2 * shape[1], dtype=dtype), rand(*shape, dtype=dtype)
    assert error(swiglu(gate_up), swiglu_reference(gate_up.double())) < BOUND[dtype]
    wide, wide_given = gate_up.double(), given.double()
    expected = swiglu_backward_reference_(wide_given, wide)
    assert error(swiglu_backward_(given, gate_up), expected) < BOUND[dtype]
    assert error(gate_up, wide) < BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "groups", "width"), [(32, 2, 128), (0, 2, 64), (6, 0, 16), (4, 4, 24)])
@pytest.mark.parametrize("added", [False, True])
def test_heads(dtype: torch.dtype, queries: int, groups: int, width: int, added: bool) -> None:
    rows, slots = 50, 70
    positions = torch.arange(90, device=DEVICE) * 400
    table = rotary_table(positions, width, 10_000.0, dtype)
    places, taken = torch.randperm(90, device=DEVICE)[:rows], torch.randperm(slots, device=DEVICE)[:rows]
    projected = rand(rows, (queries + 2 * groups) * width, dtype=dtype)
    kv = [torch.zeros(slots, 2, groups, width, device=DEVICE, dtype=dtype) for _ in range(2)]
    shared = rand(90, 3 + projected.shape[1], dtype=dtype)[:, 3:] if added else None
    found = split_heads(projected, table, places, queries, kv[0], taken, shared)
    expected = split_heads_reference(projected, table, places, queries, kv[1], taken, shared)
    for ours, theirs in ((found, expected), (kv[0], kv[1])):
        assert error(ours, theirs) < BOUND[dtype]
    given, kv_given = rand(rows, queries, width, dtype=dtype), rand(slots, 2, groups, width)
    totals = [rand(90, projected.shape[1], dtype=dtype)]
    totals.append(totals[0].clone())
    found = join_heads(given, kv_given, table, places, taken, totals[0])
    expected = join_heads_reference(given, kv_given, table, places, taken, totals[1])
    for ours, theirs in ((found, expected), (totals[0], totals[1])):
        assert error(ours, theirs) < BOUND[dtype]
    assert not torch.equal(found, projected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("queries", "groups", "width"), [(32, 2, 128), (9, 3, 64), (0, 2, 128), (4, 2, 16)])
def test_normed_heads(dtype: torch.dtype, queries: int, groups: int, width: int) -> None:
    rows, positions = 20 if INTERPRETED else 1100, 77
    table = rotary_table(torch.arange(positions, device=DEVICE) * 11, width, 10_000.0, dtype)
    places = torch.randint(0, positions, (rows,), device=DEVICE)
    projected = rand(rows, (queries + 2 * groups) * width, dtype=dtype)
    norms = HeadNorms(1 + 0.3 * rand(width), 1 + 0.3 * rand(width), 1e-5, queries, groups)
    wide = HeadNorms(norms.query.double(), norms.key.double(), 1e-5, queries, groups)
    found = split_normed_heads(projected, norms, table, places)
    expected = split_normed_heads_reference(projected.double(), wide, table, places)
    given = [rand(*value.shape, dtype=dtype) for value in found]
    sums = [torch.ones(width, device=DEVICE) for _ in range(2)]
    wide_sums = [value.double() for value in sums]
    back = normed_heads_backward(*given, projected, norms, table, places, *sums)
    back_expected = normed_heads_backward_reference(
        *(value.double() for value in given), projected.double(), wide, table, places, *wide_sums
    )
    for ours, theirs in zip((*found, back, *sums), (*expected, back_expected, *wide_sums), strict=True):
        if theirs.numel():
            assert error(ours, theirs) < BOUND[dtype]
    unnormed = split_heads_reference(  # the negative control: norms change the heads
        projected,
        table,
        places,
        queries,
        projected.new_empty(rows, 2, groups, width),
        torch.arange(rows, device=DEVICE),
    )
    assert queries == 0 or error(found[0], unnormed) > 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "entries"), [(70_000, 64), (32_000, 64), (1000, 20), (40, 40), (40, 3)])
@pytest.mark.parametrize("absent", ["none", "some"])
def test_ce_l1(dtype: torch.dtype, vocab: int, entries: int, absent: str) -> None:
    rows = 12 if INTERPRETED else 150  # more than there are programs
    logits = 3 * rand(rows, vocab)
    ids = torch.rand(rows, vocab, device=DEVICE).argsort(-1)[:, :entries].contiguous()
    p = torch.softmax(3 * rand(rows, vocab), -1).gather(1, ids)
    gone = torch.rand(rows, entries, device=DEVICE) < {"none": 0.0, "some": 0.4}[absent]
    ids, p = ids.masked_fill(gone, -1), p.masked_fill(gone, 0.0)
    tau, weight = (1 - p.sum(-1)).clamp(min=0.0), torch.rand(rows, device=DEVICE)
    mass, realised = torch.rand(rows, device=DEVICE), torch.randint(0, vocab, (rows,), device=DEVICE)
    realised[:5] = ids[:5, 0]  # the text's token is an entry of the teacher, or absent, or outside
    realised[5:8] = -1
    leaf = logits.double().requires_grad_()
    losses = ce_l1_loss(leaf, RowTeacher(ids, p.double(), tau.double(), mass.double(), realised=realised))
    (gradient,) = torch.autograd.grad(losses, leaf, weight.double())
    out = torch.full((rows, vocab), torch.nan, device=DEVICE, dtype=dtype)
    scaled = (p * mass[:, None], tau * mass)
    found, argmax = ce_l1(logits.clone(), ids, *scaled, realised, weight, out)
    assert torch.equal(argmax, logits.argmax(-1))
    torch.testing.assert_close(found.double(), losses.detach(), rtol=1e-4, atol=1e-5)
    assert error(out, gradient) < BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("vocab", "entries"), [(70_000, 64), (32_000, 64), (1000, 20), (64, 64), (40, 3)])
@pytest.mark.parametrize("absent", ["none", "some", "all"])
def test_tail_kl(dtype: torch.dtype, vocab: int, entries: int, absent: str) -> None:
    rows = 12 if INTERPRETED else 150  # more than there are programs
    logits = 4 * rand(rows, vocab)
    ids = torch.rand(rows, vocab, device=DEVICE).argsort(-1)[:, :entries].contiguous()
    p = torch.softmax(rand(rows, vocab), -1).gather(1, ids)
    gone = torch.rand(rows, entries, device=DEVICE) < {"none": 0.0, "some": 0.4, "all": 1.1}[absent]
    ids, p = ids.masked_fill(gone, -1), p.masked_fill(gone, 0.0)
    tau, weight = (1 - p.sum(-1)).clamp(min=0.0), torch.rand(rows, device=DEVICE)
    outs = [torch.full((rows, vocab), torch.nan, device=DEVICE, dtype=kind) for kind in (dtype, torch.float64)]
    expected = tail_kl_reference(logits.double(), ids, p.double(), tau.double(), weight.double(), outs[1])
    losses, argmax = tail_kl(logits.clone(), ids, p, tau, weight, outs[0])
    assert torch.equal(argmax, expected[1])
    torch.testing.assert_close(losses.double(), expected[0], rtol=1e-4, atol=1e-5)
    if absent == "all":
        assert float(outs[0].abs().max()) < 1e-6
    else:
        assert error(outs[0], outs[1]) < BOUND[dtype]
