"""The tensors of exports of any architecture: maps of draft ids, d2t in offset form and t2d, and what all must be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from draftcache.draft_train.drafts.sizes import Shape
from draftcache.store.common.errors import CheckpointError
from draftcache.store.format.vocab_map import VocabMap


def vocab_tensors(shape: Shape, vocab_map: VocabMap) -> dict[str, Tensor]:
    """Return d2t and t2d. t2d is as long as the verifier's head, which may have padding rows after the tokenizer's.

    Raises CheckpointError where the map is not the draft's.
    """
    if len(vocab_map) != shape.draft_vocab_size or vocab_map.vocab_size > shape.vocab_size:
        raise CheckpointError(
            f"expected a map of {shape.draft_vocab_size} of at most {shape.vocab_size} ids, "
            f"found {len(vocab_map)} of {vocab_map.vocab_size}"
        )
    t2d = torch.zeros(shape.vocab_size, dtype=torch.bool)
    t2d[: vocab_map.vocab_size] = torch.from_numpy(vocab_map.t2d)
    return {"d2t": torch.from_numpy(vocab_map.d2t.copy()), "t2d": t2d}


def require_same_map(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where the d2t and t2d of an export are missing or name other ids."""
    if missing := sorted({"d2t", "t2d"} - tensors.keys()):
        raise CheckpointError(f"{path}: expected d2t and t2d, missing {missing}")
    d2t = tensors["d2t"]
    targets = d2t + torch.arange(d2t.shape[0])
    if not torch.equal(targets, torch.nonzero(tensors["t2d"])[:, 0]):
        raise CheckpointError(f"{path}: expected d2t and t2d to name the same target ids, found them to differ")


def require_finite(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError where a weight of an export is NaN or infinite."""
    for name, value in tensors.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(f"{path}: {name}: expected finite weights, found NaN or infinity")
