"""Capture's kernels beside their plain twins, in the dtypes and shapes that they run in."""

from __future__ import annotations

import pytest
import torch

from draftcache.capture.kernels.attention import causal_attention, causal_attention_reference
from draftcache.capture.kernels.causal_conv import causal_conv_silu, causal_conv_silu_reference
from draftcache.capture.kernels.experts import (
    combine,
    combine_reference,
    dispatch,
    grouped_linear,
    grouped_linear_reference,
    relu_squared_,
    relu_squared_reference_,
    route,
    route_reference,
)
from draftcache.capture.kernels.norms import (
    add_rms_norm,
    add_rms_norm_reference,
    gated_group_norm,
    gated_group_norm_reference,
)
from draftcache.capture.kernels.row_stats import (
    draft_logits,
    draft_logits_reference,
    largest,
    part_largest,
    row_stats,
    row_stats_reference,
)
from support.kernel_device import BF16, DEVICE, DTYPES, F32, INTERPRETED, MARKS, rand

pytestmark = MARKS


def near(found: torch.Tensor, expected: torch.Tensor, steps: float = 1.0) -> None:
    """Within `steps` roundings of the dtype of the largest value of a row, and few elements differ at all in bf16."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    eps = torch.finfo(found.dtype).eps if found.dtype != F32 else 3e-6
    scale = expected.float().abs().clamp(min=1e-6)
    error = (found.float() - expected.float()).abs()
    bound = steps * eps * torch.maximum(scale, scale.mean())
    assert bool((error <= bound).all()), float((error / bound).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 37, 2688), (1, 513, 256)])
def test_add_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    residual, update, weight = rand(*shape, dtype=dtype), rand(*shape, dtype=dtype), rand(shape[-1], dtype=dtype)
    for given in (None, update):
        expected = add_rms_norm_reference(residual, given, weight, 1e-5)
        found = add_rms_norm(residual, None if given is None else given.clone(), weight, 1e-5)
        assert torch.equal(found[0], expected[0])
        near(found[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "width", "group"), [(1, 32, 16), (37, 4096, 512), (5, 192, 96)])
def test_gated_group_norm(dtype: torch.dtype, length: int, width: int, group: int) -> None:
    projection, values = rand(2, length, 3 * width, dtype=dtype), rand(2, length, width, dtype=dtype)
    gate, weight = projection[..., width : 2 * width], rand(width, dtype=dtype)
    expected = gated_group_norm_reference(values, gate, weight, 1e-5, group)
    near(gated_group_norm(values.clone(), gate, weight, 1e-5, group), expected, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [1, 2, 3, 31, 32, 100])
@pytest.mark.parametrize("carried", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_causal_conv(dtype: torch.dtype, length: int, carried: bool, biased: bool) -> None:
    projection = rand(2, length, 700, dtype=dtype)
    rows, weight = projection[..., 100:492], rand(392, 4, dtype=dtype)
    bias = rand(392, dtype=dtype) if biased else None
    before = rand(2, 3, 392, dtype=dtype) if carried else None
    expected = causal_conv_silu_reference(rows, weight, bias, before)
    near(causal_conv_silu(rows, weight, bias, before), expected)


@pytest.mark.parametrize("experts", [4, 100, 128])
@pytest.mark.parametrize("normalise", [False, True])
def test_route(experts: int, normalise: bool) -> None:
    logits, bias = rand(99 if INTERPRETED else 999, experts), 0.1 * rand(experts)
    logits[7] = 0.25
    top_k = min(6, experts)
    expected = route_reference(logits, bias, top_k, scaling=2.5, normalise=normalise)
    found = route(logits, bias, top_k, scaling=2.5, normalise=normalise)
    same = (found[0] == expected[0]).all(-1)
    assert float(same.float().mean()) > 0.995  # sigmoid's last bit may order two near-equal scores the other way
    assert bool(same[7])
    torch.testing.assert_close(found[1][same], expected[1][same], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts(dtype: torch.dtype) -> None:
    """The whole of it, one expert without tokens."""
    count, experts, top_k, width, inner = 500, 8, 3, 256, 192
    logits, shared = rand(count, experts), rand(count, width, dtype=dtype)
    logits[:, 5] = -20
    ids, weights = route(logits, torch.zeros(experts, device=DEVICE), top_k, scaling=2.5, normalise=True)
    rows = rand(count, width, dtype=dtype)
    up, down = rand(experts, inner, width, dtype=dtype) / 16, rand(experts, width, inner, dtype=dtype) / 14
    pairs = dispatch(ids, experts)
    assert pairs.ends.tolist() == torch.bincount(ids.flatten(), minlength=experts).cumsum(0).tolist()
    outputs = []
    for linear, act, mix in (
        (grouped_linear, relu_squared_, combine),
        (grouped_linear_reference, relu_squared_reference_, combine_reference),
    ):
        hidden = act(linear(rows[pairs.tokens], up, pairs.ends))
        outputs.append(mix(linear(hidden, down, pairs.ends), weights, pairs.pair_rows, shared.clone()))
    by_token = shared.float()
    for slot in range(top_k):
        hidden = torch.einsum("nh,nih->ni", rows.float(), up[ids[:, slot]].float()).relu().square()
        by_token += weights[:, slot, None] * torch.einsum("ni,nhi->nh", hidden, down[ids[:, slot]].float())
    bound = 2e-2 if dtype == BF16 else 1e-5
    for output in outputs:
        assert float((output.float() - by_token).norm() / by_token.norm()) < bound
    assert float((outputs[0] - outputs[1]).float().norm() / by_token.norm()) < bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "length"), [(300, 300), (1, 1), (77, 300), (1, 300), (256, 1024)])
def test_attention(dtype: torch.dtype, rows: int, length: int) -> None:
    queries = rand(1, 8, rows, 128, dtype=dtype)
    keys, values = rand(1, 2, length, 128, dtype=dtype), rand(1, 2, length, 128, dtype=dtype)
    expected = causal_attention_reference(queries.double(), keys.double(), values.double(), 0.088)
    found = causal_attention(queries, keys, values, 0.088).double()
    assert float((found - expected).norm() / expected.norm()) < (5e-3 if dtype == BF16 else 1e-5)
    shifted = causal_attention_reference(queries.double(), keys.double().roll(1, 2), values.double(), 0.088)
    if length > 1:  # the comparison can fail
        assert float((found - shifted).norm() / expected.norm()) > 0.1


@pytest.mark.parametrize("width", [10, 4096, 32000, 131072])
def test_row_stats(width: int) -> None:
    logits = 5 * rand(50, width)
    logits[3] = logits[3].round()  # ties: the lowest id counts
    logits[4] = -1e30
    found, expected = row_stats(logits), row_stats_reference(logits)
    assert torch.equal(found.argmax, expected.argmax)
    torch.testing.assert_close(found.log_sum_exp, expected.log_sum_exp, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("words", [1, 63, 64, 4096, 5000, 32000])
def test_draft_logits(words: int) -> None:
    logits = 5 * rand(20, 50_000)
    logits[3] = -1e30
    target_ids = torch.randperm(50_000, device=DEVICE)[:words].sort().values
    found, expected = draft_logits(logits, target_ids), draft_logits_reference(logits, target_ids)
    assert torch.equal(found.logits, expected.logits)
    assert found.part_largest.shape == (20, words // 64)
    assert torch.equal(found.part_largest, expected.part_largest)
    torch.testing.assert_close(found.log_sum_exp, expected.log_sum_exp, rtol=2e-6, atol=2e-6)


def test_largest_equals_topk() -> None:
    logits = rand(100, 32_000)
    found = largest(logits, part_largest(logits), 64)
    for one, two in zip(found, torch.topk(logits, 64, dim=-1), strict=True):
        assert torch.equal(one, two)
