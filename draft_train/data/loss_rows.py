"""Which (row, step) pairs of a conversation carry loss: the rules of `--loss-rows`.

- `turns`, the default: the pairs that serving meets (`draftcache.store.format.rows`). Row t carries loss while the turn
  of its token x_{t+1} goes on. A step's loss is the mean over the rows of each conversation.
- `unshifted`: the rule of SpecForge 0.2, for comparison. Its loss mask is not shifted when inputs and targets are, so
  (t, k) carries loss iff `mask[t+k]`, though the pair predicts x_{t+2+k}. Hence no pair ever predicts the second token
  of a turn, which is the first token that a draft proposes there; up to two pairs per turn and step are trained on
  tokens after its end; and rows up to k before a turn carry loss at step k, though no draft starts there. A step's loss
  is the sum over these pairs divided by the padded size of the batch: its conversations x the tokens of the longest
  conversation that is packed with them (the longest of the step, if `--pack-tokens` holds a whole step). SpecForge's
  attention without a window is `--sliding-window 0`, and its dropped rows are `--out-of-vocab drop`.

A store has teacher entries where `turns` needs them: at positions p with mask[p] and mask[p+1]. It therefore lacks
those that `unshifted` wants past the end of each turn. These pairs are left out, and `left_out_pairs` counts them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from draftcache.store.common.errors import InputError
from draftcache.store.format.rows import start_rows, teacher_positions, tokens_left
from draftcache.store.reader import StoreReader


@dataclass(frozen=True)
class LossRows:
    """The S rows of one conversation that have queries, in ascending order."""

    starts: NDArray[np.int64]
    """[S] row numbers, which are positions in the conversation."""
    steps: NDArray[np.int64]
    """[S] steps to compute for each row, at least 1."""
    carries: NDArray[np.bool_]
    """[S, max_steps]: which steps of a row carry loss. None at or beyond `steps` does."""

    def take(self, chosen: NDArray[np.int64]) -> LossRows:
        """Return some of these rows, by their numbers in ascending order."""
        return LossRows(self.starts[chosen], self.steps[chosen], self.carries[chosen])


@dataclass(frozen=True)
class AnchorDraw:
    """The start rows of an epoch: a share of those of each conversation, which seed, epoch and content decide."""

    share: float
    seed: int
    epoch: int

    def taken(self, content_hash: str, rows: int) -> NDArray[np.int64]:
        """Return the numbers, ascending, of the start rows that are taken of a conversation's `rows`, rounded up."""
        draw = np.random.default_rng([self.seed, self.epoch, int(content_hash[:16], 16)])
        return np.sort(draw.permutation(rows)[: math.ceil(self.share * rows)])


def turn_rows(loss_mask: NDArray[np.bool_], max_steps: int) -> LossRows:
    """Return the pairs of the rule `turns`."""
    starts = start_rows(loss_mask)
    steps = np.minimum(tokens_left(loss_mask, starts), max_steps)
    return LossRows(starts, steps, np.arange(max_steps)[None, :] < steps[:, None])


def unshifted_rows(loss_mask: NDArray[np.bool_], max_steps: int) -> LossRows:
    """Return the pairs of the rule `unshifted` whose teacher, at position t+1+k, is stored."""
    stored = np.zeros(loss_mask.shape[0] + max_steps + 1, np.bool_)
    stored[teacher_positions(loss_mask)] = True
    carries = _wanted(loss_mask, max_steps) & stored[_positions(loss_mask.shape[0], max_steps)]
    starts = np.flatnonzero(carries.any(1))
    steps = max_steps - np.argmax(carries[starts, ::-1], axis=1)
    return LossRows(starts, steps.astype(np.int64), carries[starts])


def left_out_pairs(store: StoreReader, members: NDArray[np.int64], max_steps: int) -> tuple[int, int]:
    """Return how many pairs of `unshifted` lack a stored teacher, and how many pairs it has, over all `members`."""
    kept = wanted = 0
    for number in members:
        mask = store.read(int(number), ["loss_mask"]).loss_mask
        kept += int(unshifted_rows(mask, max_steps).carries.sum())
        wanted += int(_wanted(mask, max_steps).sum())
    return wanted - kept, wanted


def _positions(length: int, max_steps: int) -> NDArray[np.int64]:
    """Return the teacher's position of each pair, [L, max_steps]."""
    return np.arange(length)[:, None] + 1 + np.arange(max_steps)


def _wanted(loss_mask: NDArray[np.bool_], max_steps: int) -> NDArray[np.bool_]:
    """[L, max_steps]: mask[t+k]; its last token counts as unmasked, as the last target does not exist."""
    padded = np.append(loss_mask[:-1], np.zeros(max_steps + 1, np.bool_))
    return padded[_positions(loss_mask.shape[0], max_steps) - 1]


LossRowRule = Callable[[NDArray[np.bool_], int], LossRows]
"""Returns the loss rows of a conversation from its loss mask [L] bool and the number of steps."""

LOSS_ROW_RULES: dict[str, LossRowRule] = {"turns": turn_rows, "unshifted": unshifted_rows}


def find_loss_rows(name: str) -> LossRowRule:
    """Return the rule of this name. Raises InputError, which names all rules, where there is none."""
    if name not in LOSS_ROW_RULES:
        raise InputError(f"--loss-rows: expected one of {list(LOSS_ROW_RULES)}, found {name!r}")
    return LOSS_ROW_RULES[name]
