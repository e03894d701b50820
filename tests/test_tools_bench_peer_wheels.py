"""The benchmark of other trainers: its stand-ins for flash-attn, and what it refuses."""

from __future__ import annotations

import zipfile
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from draftcache.store.common.errors import InputError
from draftcache.tools.bench.parts.peer_wheels import flash_attention, flash_attention_varlen, unpacked_wheels

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


def _naive(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of one conversation in float64: [T, N, D] -> output, log-sum-exp [N, T]."""
    query, key, value = (tensor.double() for tensor in (query, key, value))
    scores = torch.einsum("tnd,snd->nts", query, key) * 0.3
    scores = scores.masked_fill(~torch.ones(scores.shape[1:], dtype=torch.bool, device=query.device).tril(), -torch.inf)
    return torch.einsum("nts,snd->tnd", scores.softmax(-1), value), scores.logsumexp(-1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packed", [False, True])
def test_flash_stand_ins_equal_plain_attention(device: str, packed: bool) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(96, 4, 64, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    grad = torch.randn(96, 4, 64, device=device, dtype=torch.bfloat16)
    bounds = [0, 40, 96] if packed else [0, 96]
    if packed:
        cut = torch.tensor(bounds, dtype=torch.int32, device=device)
        output, lse, _ = flash_attention_varlen(
            *inputs,
            cu_seqlens_q=cut,
            cu_seqlens_k=cut,
            max_seqlen_q=56,
            max_seqlen_k=56,
            softmax_scale=0.3,
            causal=True,
        )
    else:
        whole = flash_attention(*(tensor[None] for tensor in inputs), softmax_scale=0.3, causal=True)
        output, lse = whole[0][0], whole[1][0]
    pieces = [_naive(*(tensor[a:b] for tensor in inputs)) for a, b in pairwise(bounds)]
    expected = torch.cat([piece[0] for piece in pieces])
    torch.testing.assert_close(output.double(), expected, atol=2e-2, rtol=0)
    torch.testing.assert_close(lse.double(), torch.cat([piece[1] for piece in pieces], dim=1), atol=1e-3, rtol=0)
    assert not lse.requires_grad  # as flash-attn's: the draft's merge with its own keys gets none through it
    found = torch.autograd.grad(output, inputs, grad)
    for ours, theirs in zip(found, torch.autograd.grad(expected, inputs, grad.double()), strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=5e-2, rtol=0)


def test_a_missing_wheel_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "specforge-0.2.0-py3-none-any.whl", "w") as archive:
        archive.writestr("specforge/__init__.py", "")
    with pytest.raises(InputError, match="expected one wheel nemo_automodel"), unpacked_wheels(tmp_path):
        pass
    with unpacked_wheels(tmp_path, ["specforge"]) as root:  # only what is asked for has to be there
        assert (root / "specforge" / "__init__.py").is_file()
