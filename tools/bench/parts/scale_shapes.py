"""What `draftcache.tools.bench.scale` runs: the 30B verifier's shape, or a tiny one for two CPU cores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftcache.draft_train.drafts.eagle3.shape import Eagle3Shape
from draftcache.tools.bench.parts.train_cases import SHAPE
from draftcache.tools.bench.parts.verifier_shape import DRAFT_VOCAB, LAYERS, verifier_config

LOSS_SHARE, TURNS = 0.48, 8


@dataclass(frozen=True, kw_only=True)
class ScaleShape:
    """Sizes of a verifier, of its data and of the draft that is trained from it."""

    verifier: Callable[[], Any]
    """Returns the configuration of a NemotronH."""
    layers: tuple[int, ...]
    longest: int
    """Most tokens of a conversation; the fewest are 30."""
    capture_tokens: int
    """Tokens per GPU of a capture."""
    shard_tokens: int
    draft_vocab: int
    draft: Eagle3Shape
    steps: int
    """Steps of a training epoch, with a conversation per rank."""
    file_bytes: int = 4 << 30
    """Most bytes of a file of the checkpoint."""


def _small_config() -> Any:
    from transformers import NemotronHConfig

    return NemotronHConfig(
        vocab_size=512, hidden_size=32, hybrid_override_pattern="MEM*E", num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=16, n_groups=2, chunk_size=16,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, moe_shared_expert_intermediate_size=24,
        intermediate_size=32, n_group=1, topk_group=1, max_position_embeddings=4096, bos_token_id=0, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip


SHAPES = {
    "30b": ScaleShape(
        verifier=verifier_config, layers=LAYERS, longest=32_768, capture_tokens=1_800_000, shard_tokens=65_536,
        draft_vocab=DRAFT_VOCAB, draft=SHAPE, steps=48,
    ),
    "small": ScaleShape(
        verifier=_small_config, layers=(0, 1, 2), longest=400, capture_tokens=6_000, shard_tokens=500, draft_vocab=200,
        draft=replace(
            SHAPE, hidden_size=32, num_attention_heads=4, head_dim=16, intermediate_size=64, vocab_size=4096,
            draft_vocab_size=1600, sliding_window=64,
        ),
        steps=12, file_bytes=1 << 16,
    ),
}  # fmt: skip


def mixed_lengths(longest: int, *, tokens: int = 0, count: int = 0) -> list[int]:
    """Return random lengths of 30 to `longest` tokens, 43 % of it in the mean: `count`, or at least `tokens` in all."""
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while len(lengths) < count or sum(lengths) < tokens:
        lengths.append(int(30 + (longest - 30) * rng.beta(0.85, 1.14)))
    return lengths


def turns_mask(length: int) -> NDArray[np.bool_]:
    """Return the loss mask of a conversation of 8 turns of equal length; the assistant wrote the last 48 % of each."""
    turn = np.arange(length) * TURNS % max(length, 1) / max(length, 1)
    mask: NDArray[np.bool_] = turn >= 1 - LOSS_SHARE
    return mask
