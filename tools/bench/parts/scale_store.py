"""The store that `draftcache.tools.bench.scale` trains from: random states of mixed lengths, written by all ranks."""

from __future__ import annotations

from pathlib import Path

import torch

from draftcache.draft_train.ranks import Ranks
from draftcache.store.writer import StoreWriter
from draftcache.tools.bench.parts.scale_shapes import ScaleShape, mixed_lengths, turns_mask
from draftcache.tools.bench.parts.train_loader import frozen_files, random_conversation, store_manifest

SPLIT, CHECK_SPLIT = "train", "check"
CHECKED = 8
"""Conversations of `CHECK_SPLIT`, on which the losses of several world sizes are compared."""


def training_lengths(shape: ScaleShape) -> list[int]:
    """Return the lengths of the store's conversations, those of `CHECK_SPLIT` last."""
    return mixed_lengths(shape.longest, count=shape.conversations + CHECKED)


def write_part(root: Path, shape: ScaleShape, ranks: Ranks) -> None:
    """Write this rank's shards, one conversation each; rank 0 then finishes the store."""
    lengths = training_lengths(shape)
    splits = (SPLIT, CHECK_SPLIT)
    manifest, words = store_manifest(shape.draft, max(lengths), len(lengths), splits=splits)
    torch.manual_seed(0)  # every rank offers the same frozen weights; the first one's are kept
    with StoreWriter(root, manifest, frozen_files(shape.draft, words, ranks.device)) as writer:
        for number in range(ranks.rank, len(lengths), ranks.world):
            torch.manual_seed(number)
            item = random_conversation(
                shape.draft, lengths[number], number, ranks.device, mask=turns_mask(lengths[number]),
                split=int(number >= shape.conversations),
            )  # fmt: skip
            writer.write_shard(number, [item], {"quarantined": [], "gates": {}})
        ranks.meet()
        if ranks.leads:
            assert writer.finish(), "every rank has written its shards"
