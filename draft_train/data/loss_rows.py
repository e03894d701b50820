"""Which (row, step) pairs of a conversation carry loss: the rule of `--loss-rows`.

- `turns`, the default: the pairs that serving meets (`draftcache.store.format.rows`). Row t carries loss while the turn
  that its x_{t+1} belongs to goes on; a step's loss is the mean over each conversation's rows.
- `unshifted`: SpecForge 0.2's, for comparison. Its loss mask stays where the tokens are while inputs and targets move,
  so (t, k) carries loss iff `mask[t+k]`, though the pair predicts x_{t+2+k}. Hence no pair ever predicts a turn's
  second token, the first that a draft in it proposes; up to two pairs per turn and step are trained on what follows
  its end; and rows up to k before a turn carry loss at step k, though no draft starts there. A step's loss is
  the sum over these pairs divided by the batch's size, padding included: conversations x tokens of the longest of those
  that go through together (`--pack-tokens` large enough for a whole step makes it theirs). Its window-less attention is
  `--sliding-window 0`, its dropped rows `--out-of-vocab drop`.

A store has teacher entries where `turns` needs them: at positions p with mask[p] and mask[p+1]. Of what `unshifted`
wants, those past the end of each turn are therefore missing: they are left out, and `left_out_pairs` counts them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from draftcache.store.common.errors import InputError
from draftcache.store.format.rows import start_rows, teacher_positions, tokens_left
from draftcache.store.reader import StoreReader


@dataclass(frozen=True)
class LossRows:
    """Of one conversation; S rows, ascending."""

    starts: NDArray[np.int64]
    """[S] rows that have queries."""
    steps: NDArray[np.int64]
    """[S] steps to compute of each, at least 1."""
    carries: NDArray[np.bool_]
    """[S, max_steps]: which of these carry loss; never one at or beyond `steps`."""


def turn_rows(loss_mask: NDArray[np.bool_], max_steps: int) -> LossRows:
    """The pairs of `turns`."""
    starts = start_rows(loss_mask)
    steps = np.minimum(tokens_left(loss_mask, starts), max_steps)
    return LossRows(starts, steps, np.arange(max_steps)[None, :] < steps[:, None])


def unshifted_rows(loss_mask: NDArray[np.bool_], max_steps: int) -> LossRows:
    """The pairs of `unshifted` whose teacher, at position t+1+k, is stored."""
    stored = np.zeros(loss_mask.shape[0] + max_steps + 1, np.bool_)
    stored[teacher_positions(loss_mask)] = True
    carries = _wanted(loss_mask, max_steps) & stored[_positions(loss_mask.shape[0], max_steps)]
    starts = np.flatnonzero(carries.any(1))
    steps = max_steps - np.argmax(carries[starts, ::-1], axis=1)
    return LossRows(starts, steps.astype(np.int64), carries[starts])


def left_out_pairs(store: StoreReader, members: NDArray[np.int64], max_steps: int) -> tuple[int, int]:
    """Pairs that `unshifted` wants and the store has no teacher for, and all that it wants, over conversations."""
    kept = wanted = 0
    for number in members:
        mask = store.read(int(number), ["loss_mask"]).loss_mask
        kept += int(unshifted_rows(mask, max_steps).carries.sum())
        wanted += int(_wanted(mask, max_steps).sum())
    return wanted - kept, wanted


def _positions(length: int, max_steps: int) -> NDArray[np.int64]:
    """[L, max_steps]: the teacher's position of each pair."""
    return np.arange(length)[:, None] + 1 + np.arange(max_steps)


def _wanted(loss_mask: NDArray[np.bool_], max_steps: int) -> NDArray[np.bool_]:
    """[L, max_steps]: mask[t+k]; its last token counts as unmasked, as the last target does not exist."""
    padded = np.append(loss_mask[:-1], np.zeros(max_steps + 1, np.bool_))
    return padded[_positions(loss_mask.shape[0], max_steps) - 1]


LossRowRule = Callable[[NDArray[np.bool_], int], LossRows]
"""A conversation's loss mask [L] bool and the number of steps -> its loss rows."""

LOSS_ROW_RULES: dict[str, LossRowRule] = {"turns": turn_rows, "unshifted": unshifted_rows}


def find_loss_rows(name: str) -> LossRowRule:
    """The rule of this name. Raises InputError naming those there are."""
    if name not in LOSS_ROW_RULES:
        raise InputError(f"--loss-rows: expected one of {list(LOSS_ROW_RULES)}, found {name!r}")
    return LOSS_ROW_RULES[name]
