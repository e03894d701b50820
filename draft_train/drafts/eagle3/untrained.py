"""The draft before its first step: its shape, which the store decides, and its weights."""

from __future__ import annotations

from typing import Any

import torch

from draftcache.draft_train.config import DraftShape, TrainConfig
from draftcache.draft_train.data.frozen import FrozenWeights
from draftcache.draft_train.drafts.eagle3.model import DraftModel
from draftcache.store.reader import StoreReader


def draft_shape(config: TrainConfig, store: StoreReader) -> DraftShape:
    """The draft that fits this store: hidden size, taps and vocabularies are the store's."""
    manifest = store.manifest
    return DraftShape(
        hidden_size=manifest.hidden_size,
        taps=len(manifest.taps),
        intermediate_size=config.intermediate_size or 3 * manifest.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        vocab_size=int(manifest.verifier["vocab_size"]),
        draft_vocab_size=manifest.teacher_form.choose(config.draft_vocab_size).size,
        sliding_window=config.sliding_window or None,
        rope_theta=config.rope_theta,
        rms_norm_eps=float(manifest.verifier["rms_norm_eps"]),
    )


def untrained_draft(shape: DraftShape, objective: dict[str, Any], frozen: FrozenWeights) -> DraftModel:
    """The draft at step 0 of a run with these settings, on the device of the frozen weights."""
    with torch.device(frozen.embed_tokens.device):
        model = DraftModel(shape)
    from_verifier = objective["head_init"] == "verifier"
    model.initialize(
        int(objective["seed"]),
        head=frozen.lm_head.cpu() if from_verifier else None,
        norm=frozen.norm.cpu() if from_verifier else None,
    )
    return model
