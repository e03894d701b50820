"""Tiny block drafts over the synthetic stores' widths, in float64, and batches for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from draftcache.draft_train.data.batches import Batch, build_batch
from draftcache.draft_train.drafts.block.model import BlockModel
from draftcache.draft_train.drafts.block.shape import BlockShape
from draftcache.store.format.schema import Conversation
from support.draft_models import embeddings
from support.synthetic import DRAFT_VOCAB, HIDDEN, LAYERS, VOCAB, conversation, manifest, turns

MASK_TOKEN = VOCAB - 1
BLOCK = 4
"""Slots of a block."""
WINDOW = 7
"""The sliding layers' window, shorter than the conversations."""
SHAPES: dict[str, dict[str, Any]] = {
    "dspark": {"markov_rank": 3},
    "dspark bonus anchor": {"markov_rank": 3, "bonus_anchor": True, "attention_sinks": True},
    "dflash": {"bonus_anchor": True, "causal": (False, False)},
    "dflash mixed": {"bonus_anchor": True, "layer_types": ("full", "sliding"), "causal": (False, True)},
    "full": {"layer_types": ("full", "full"), "window": None, "causal": (True, False), "attention_sinks": True},
    "everything trained": {"markov_rank": 3, "train_head": True, "train_embeddings": True, "confidence_head": True},
    "one slot wide": {"markov_rank": 3, "window": 2, "causal": (False, True)},
}
"""Settings of shapes by what is particular about them."""


def make_shape(**changes: Any) -> BlockShape:
    """Make the shape of a DSpark draft with two sliding layers, with these fields changed."""
    values: dict[str, Any] = {
        "hidden_size": HIDDEN, "taps": len(LAYERS), "num_hidden_layers": 2, "intermediate_size": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "vocab_size": VOCAB,
        "draft_vocab_size": DRAFT_VOCAB, "window": WINDOW, "layer_types": ("sliding", "sliding"),
        "causal": (True, True), "rope_theta": 10_000.0, "rms_norm_eps": 1e-5, "block_size": BLOCK,
        "bonus_anchor": False, "mask_token_id": MASK_TOKEN,
    }  # fmt: skip
    return BlockShape(**values | changes)


def make_model(shape: BlockShape) -> BlockModel:
    """Make a draft whose weights are so large that every part of it shows in its outputs."""
    noise = torch.Generator().manual_seed(0)
    model = BlockModel(shape)
    head = torch.randn(shape.draft_vocab_size, shape.hidden_size, generator=noise)
    model.initialize(0, head=head, embeddings=embeddings().float())
    with torch.no_grad():
        for parameter in model.parameters():
            vector = 0.3 * torch.randn(parameter.shape, generator=noise)
            parameter.mul_(8.0) if parameter.ndim == 2 else parameter.add_(vector)
    return model.double()


def conversations() -> list[Conversation]:
    """Make two conversations of unlike lengths, which do not have the mask token."""
    rng = np.random.default_rng(0)
    masks = (turns(34, (12, 28)), turns(26, (3, 6), (15, 25)))
    return [conversation(rng, mask, tokens=MASK_TOKEN) for mask in masks]


def batch_of(shape: BlockShape, items: list[Conversation]) -> Batch:
    """Put conversations into one batch for a draft of this shape."""
    return build_batch(items, manifest().codec, max_steps=shape.steps, window=shape.sliding_window, next_tokens=True)
