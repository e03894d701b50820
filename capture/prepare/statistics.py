"""What a split holds, for its dataset's manifest: lengths of conversations and answers, and why rows were set aside.

Everything is counted as rows are written, in their order, so that it is exact and the same for any number of workers.
Memory is bounded by the number of distinct lengths, at most the longest conversation, and of reasons.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from draftcache.capture.prepare.rows.rejections import Rejection
from draftcache.store.common.length_counts import LengthCounts


def loss_runs(loss_mask: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the runs of tokens with loss ("answers") of packed conversations; none goes on into the next conversation.

    `loss_mask`: bool [t]; `lengths`: integers [n] above 0, whose sum is t. Returns the first token of each run and the
    one behind its last, int64 [runs], as positions in `loss_mask`.
    """
    before, after = np.zeros_like(loss_mask), np.zeros_like(loss_mask)
    before[1:], after[:-1] = loss_mask[:-1], loss_mask[1:]
    ends = np.cumsum(lengths)
    before[ends[:-1]] = False
    after[ends - 1] = False
    return np.flatnonzero(loss_mask & ~before), np.flatnonzero(loss_mask & ~after) + 1


class SplitStatistics:
    """Counts the conversations and the rejected rows of one split; `record()` is their part of the manifest."""

    def __init__(self) -> None:
        self._conversations, self._answers = LengthCounts(), LengthCounts()
        self._quarantined: Counter[str] = Counter()
        self._examples: dict[str, Rejection] = {}

    def add(self, loss_mask: np.ndarray, lengths: np.ndarray) -> None:
        """Count packed conversations: loss masks bool [t], and lengths in tokens, int64 [n]."""
        starts, ends = loss_runs(loss_mask, lengths)
        self._conversations.add(lengths)
        self._answers.add(ends - starts)

    def reject(self, rejection: Rejection) -> None:
        """Count a row that cannot be used; the first one of a reason is its example."""
        self._quarantined[rejection.reason] += 1
        self._examples.setdefault(rejection.reason, rejection)

    def record(self, read_rows: int) -> dict[str, Any]:
        """Return `lengths`, `answer_lengths` (both as `LengthCounts.as_json`) and `quarantine`, by reason.

        `read_rows`: all rows of the split, those set aside too, of which each reason has a `fraction`.
        """
        return {
            "lengths": self._conversations.as_json(),
            "answer_lengths": self._answers.as_json(),
            "quarantine": {
                reason: {
                    "rows": rows,
                    "fraction": rows / read_rows,
                    "example": {
                        name: _encodable(value) if isinstance(value, str) else value
                        for name, value in self._examples[reason].as_json().items()
                        if name != "reason"
                    },
                }
                for reason, rows in sorted(self._quarantined.items())
            },
        }


def _encodable(text: str) -> str:
    """Return the text with lone surrogates, of which the row may be accused, as escapes: UTF-8 can't hold them."""
    return text.encode("utf-8", "backslashreplace").decode()
