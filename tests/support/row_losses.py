"""Losses of rows by name, called with the parts of a teacher one by one."""

from __future__ import annotations

from collections.abc import Callable

import torch

from draftcache.draft_train.loss import row_losses
from draftcache.draft_train.loss.row_losses import RowTeacher

Parts = tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""Ids [T, K] int64, p [T, K], tau [T] and the draft vocabulary's mass [T]."""


def row_loss(name: str) -> Callable[..., torch.Tensor]:
    """The loss of this name as a function of logits [T, V] and of `Parts`."""
    loss = row_losses.find_loss(name)
    return lambda logits, *parts: loss.function(logits, RowTeacher(*parts, realised=text(len(logits), logits.shape[1])))


def text(rows: int, vocab_size: int) -> torch.Tensor:
    """The draft ids [rows] int64 of a made-up text, of which the first token is outside the draft vocabulary."""
    ids = (3 * torch.arange(rows) + 1) % vocab_size
    ids[:1] = -1
    return ids


def acceptance(logits: torch.Tensor, *parts: torch.Tensor | None) -> torch.Tensor:
    """alpha [T] as a function of logits [T, V] and of `Parts`."""
    return row_losses.acceptance(logits, RowTeacher(*parts))  # type: ignore[arg-type]
