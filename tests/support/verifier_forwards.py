"""Running a verifier's forward, and how far two forwards are apart."""

from __future__ import annotations

import torch

from draftcache.capture.verifier.forward import Forward


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Draw token ids, int64 [batch, length], that the tiny models and the demo verifier both have."""
    return torch.randint(3, 600, (batch, length), generator=torch.Generator().manual_seed(seed))


def run(forward: Forward, ids: torch.Tensor, layers: tuple[int, ...], chunk: int = 1 << 20) -> list[torch.Tensor]:
    """Return the taps in the order of `layers` and then the final states, each [B, L, H], of token ids [B, L].

    The forward is given `chunk` tokens at a time.
    """
    pieces = list(forward.prefill(ids, layers, chunk))
    assert [piece.first for piece in pieces] == list(range(0, ids.shape[1], chunk))
    parts = [[*(piece.taps[layer] for layer in layers), piece.final] for piece in pieces]
    return [torch.cat(tensors, 1) for tensors in zip(*parts, strict=True)]


def worst(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return the largest difference of two tensors of a pair, relative to the expected one in the 2-norm."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))
