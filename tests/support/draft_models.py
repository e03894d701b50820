"""A tiny draft over the synthetic stores' widths, in float64, and the embeddings of its verifier."""

from __future__ import annotations

import torch

from draftcache.draft_train.drafts.eagle3.model import Eagle3Model
from draftcache.draft_train.drafts.eagle3.shape import Eagle3Shape
from support.synthetic import DRAFT_VOCAB, HIDDEN, LAYERS, VOCAB

STEPS = 4
"""Steps of the unroll."""
WINDOW = 7
"""The draft's sliding window, shorter than the conversations."""


EAGLE31 = {"fc_norm": True, "norm_output": True}
"""The switches of the shape that make an Eagle3 draft an Eagle3.1 draft."""


def make_model(window: int | None = WINDOW, **switches: bool) -> Eagle3Model:
    """Make a draft whose weights are so large that every part of it shows in its outputs."""
    shape = Eagle3Shape(
        hidden_size=HIDDEN, taps=len(LAYERS), intermediate_size=16, num_attention_heads=4, num_key_value_heads=2,
        head_dim=6, vocab_size=VOCAB, draft_vocab_size=DRAFT_VOCAB, sliding_window=window, rope_theta=10_000.0,
        rms_norm_eps=1e-5, **switches,
    )  # fmt: skip
    model = Eagle3Model(shape)
    model.initialize(0)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            vector = 0.3 * torch.randn(parameter.shape, generator=noise)
            parameter.mul_(8.0) if parameter.ndim == 2 else parameter.add_(vector)
    return model.double()


def embeddings() -> torch.Tensor:
    """Return the frozen table of token embeddings, float64 [VOCAB, HIDDEN]."""
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(5)).double()
