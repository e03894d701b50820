"""Acceptance under speculative sampling at a temperature, as an interval that the stored teacher allows.

`overlap` bounds the probability alpha of each draft token along the text of the store. From a start row, n draft tokens
are accepted with probability `alpha_0 .. alpha_(n-1) (1 - alpha_n)`; the expected number of verify steps of a turn then
follows from its end backwards:

    N(t) = 1 + sum_n P(n | t) N(t + n + 1)

Every alpha is known to lie between two bounds. N is linear in each of them, so the least and the most of it are found
row by row at the ends of the intervals, and the true N lies between. The acceptance length is tokens over verify steps.

Contexts are those of the text: from the second draft token on, speculative sampling sees tokens that it accepted,
which follow min(p, q) and not the text. So the figure is teacher-forced, as greedy figures on foreign text are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from draftcache.draft_train.data.batches import Batch
from draftcache.draft_train.data.frozen import FrozenWeights
from draftcache.draft_train.drafts.protocol import Draft
from draftcache.draft_train.intervals import RESAMPLES, interval, ratio, resampled_sums
from draftcache.draft_train.overlap import overlap_bounds, rows_at_once, teacher_rows
from draftcache.store.common.errors import InputError
from draftcache.store.reader import StoreReader

Overlaps = Callable[[Batch], torch.Tensor]
"""Returns [S, draft_tokens, 2] float64 for a batch: bounds of each alpha; 0 past a row's steps."""


def require_temperature(temperature: float) -> float:
    """Return a temperature. Raises InputError where it is not from 0.05 to 20; greedy figures need none."""
    if not 0.05 <= temperature <= 20:
        raise InputError(
            f"--temperature: expected 0.05 to 20, found {temperature}; leave it out for greedy decoding, T = 0"
        )
    return temperature


def draft_overlaps(
    draft: Draft, frozen: FrozenWeights, store: StoreReader, *, draft_tokens: int, temperature: float, compute: str
) -> Overlaps:
    """Return the overlaps of a draft at a temperature. `compute` is that of `Draft.logit_reader`."""
    read = draft.logit_reader(frozen, compute)
    vocab = store.vocab_map(draft.shape.draft_vocab_size).padded(draft.shape.vocab_size)
    inside = torch.from_numpy(vocab.t2d).to(frozen.embed_tokens.device)

    @torch.inference_mode()
    def overlaps(batch: Batch) -> torch.Tensor:
        size = (batch.start_index.shape[0], draft_tokens, 2)
        found = torch.zeros(size, dtype=torch.float64, device=batch.taps.device)
        entries = draft.shape.draft_vocab_size if batch.teacher_hidden is not None else batch.teacher_ids.shape[1]
        for number, rows, logits in read(batch, draft_tokens):
            for first in range(0, rows.shape[0], rows_at_once(entries)):
                chosen = slice(first, first + rows_at_once(entries))
                some, part = rows[chosen], logits[chosen]
                teacher = teacher_rows(batch, batch.teacher_index[some, number], frozen, inside)
                found[some, number] = torch.stack(overlap_bounds(part, teacher, temperature), dim=-1)
        return found

    return overlaps


def expected_steps(bounds: NDArray[np.float64], *, most: bool) -> float:
    """Return the least or the most expected number of verify steps of one turn.

    `bounds` [M, draft_tokens, 2] are those of each alpha from every start row of the turn, in order: row i is followed
    by M - i tokens. The cost is M x draft_tokens operations of the host.
    """
    rows, count = bounds.shape[:2]
    low, high = bounds[..., 0].tolist(), bounds[..., 1].tolist()
    if most:  # the most of N is the least of -N
        low, high = high, low
    ahead = [0.0] * (rows + count + 2)
    for row in range(rows - 1, -1, -1):
        usable = min(count, rows - row)
        value = ahead[row + usable + 1]
        for number in range(usable - 1, -1, -1):
            stopped = ahead[row + number + 1]
            alpha = high[row][number] if value < stopped else low[row][number]
            value = stopped + alpha * (value - stopped)
        ahead[row] = 1.0 + value
    return ahead[0]


@dataclass
class SampledCounts:
    """Expected verify steps of conversations, and the sums of their alphas."""

    draft_tokens: int
    temperature: float
    members: int
    by_conversation: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 3)))
    """[C, 3]: tokens, the least and the most expected verify steps of each conversation."""
    overlap: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 3)))
    """[draft_tokens, 3]: rows at step k, and the sums of the lower and upper bounds of their alphas."""

    def __post_init__(self) -> None:
        if self.by_conversation.size == 0:
            self.by_conversation = np.zeros((self.members, 3))
            self.overlap = np.zeros((self.draft_tokens, 3))

    def add(self, left: NDArray[np.int64], bounds: NDArray[np.float64], conversations: NDArray[np.int64]) -> None:
        """Count a batch: `left` and `conversations` are those of `acceptance.count_chain`, `bounds` [S, K, 2]."""
        usable = np.arange(self.draft_tokens) < left[:, None]
        self.overlap += np.concatenate((usable.sum(axis=0)[:, None], (bounds * usable[..., None]).sum(axis=0)), axis=1)
        ends = np.flatnonzero(left == 1) + 1  # the last start row of each turn is followed by one token
        for first, last in pairwise((0, *ends.tolist())):
            row = self.by_conversation[conversations[first]]
            row += (last - first, *(expected_steps(bounds[first:last], most=most) for most in (False, True)))

    def to_json(self, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
        """Return the figures. `acceptance_length` is [lower, upper]; `interval` holds the draw of conversations too."""
        tokens, least, most = self.by_conversation.sum(axis=0)
        draws = resampled_sums(self.by_conversation, resamples=resamples, seed=seed)
        ends = [interval(ratio(draws[:, 0], draws[:, column]), self.members) for column in (2, 1)]
        rows = np.maximum(1, self.overlap[:, :1])
        return {
            "temperature": self.temperature,
            "acceptance_length": [float(tokens / max(most, 1)), float(tokens / max(least, 1))],
            "interval": None if ends[0] is None or ends[1] is None else [ends[0][0], ends[1][1]],
            "overlap": (self.overlap[:, 1:] / rows).tolist(),
            "tokens": int(tokens),
        }
