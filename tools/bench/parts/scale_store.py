"""The store that `draftcache.tools.bench.scale` trains from: random states of mixed lengths, written by all ranks."""

from __future__ import annotations

from pathlib import Path

import torch

from draftcache.draft_train.ranks import Ranks
from draftcache.store.writer import StoreWriter
from draftcache.tools.bench.parts.scale_shapes import ScaleShape, mixed_lengths, turns_mask
from draftcache.tools.bench.parts.train_loader import frozen_files, random_conversation, store_manifest

CHECK_SPLIT = "check"
CHECKED = 8
"""Conversations of `CHECK_SPLIT`, on which the losses of several world sizes are compared."""


def part_splits(ranks: int) -> tuple[str, ...]:
    """Return the splits that `ranks` ranks train on: a part of the store per rank, so that work grows with them."""
    return tuple(f"part-{number}" for number in range(ranks))


def training_lengths(shape: ScaleShape, ranks: int) -> list[int]:
    """Return the lengths of the store's conversations: part by part, and then those of `CHECK_SPLIT`."""
    return mixed_lengths(shape.longest, count=shape.steps * ranks + CHECKED)


def write_part(root: Path, shape: ScaleShape, ranks: Ranks) -> None:
    """Write this rank's shards, one conversation each; rank 0 then finishes the store."""
    lengths = training_lengths(shape, ranks.world)
    splits = (*part_splits(ranks.world), CHECK_SPLIT)
    manifest, words = store_manifest(shape.draft, max(lengths), len(lengths), splits=splits)
    torch.manual_seed(0)  # every rank offers the same frozen weights; the first one's are kept
    with StoreWriter(root, manifest, frozen_files(shape.draft, words, ranks.device)) as writer:
        for number in range(ranks.rank, len(lengths), ranks.world):
            torch.manual_seed(number)
            item = random_conversation(
                shape.draft, lengths[number], number, ranks.device, mask=turns_mask(lengths[number]),
                split=min(number // shape.steps, ranks.world),
            )  # fmt: skip
            writer.write_shard(number, [item], {"quarantined": [], "gates": {}})
        ranks.meet()
        if ranks.leads:
            assert writer.finish(), "every rank has written its shards"
