"""Offline acceptance: how many tokens per verify step a served draft would win, computed from the store alone.

With greedy verification, a chain that starts at row t is accepted while the draft's argmax equals the verifier's. In
conversations that the verifier itself wrote greedily, the realised tokens are its argmaxes. The teacher-forced steps
are then the served steps up to the first mismatch: accepted lengths n(t) are exact, and walking `t -> t + n(t) + 1`
counts the verify steps that serving makes. On other text, even where a single token differs, the figure is
teacher-forced, which serves for comparison and predicts nothing. A verifier argmax outside the draft vocabulary counts
as a rejection, never as a missing value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

LENGTH_BUCKETS = (16_384, 32_768, 65_536)
"""Tokens that separate the buckets of positions and of lengths, unless others are asked for."""


@dataclass
class AcceptanceCounts:
    """Counts over conversations. The sums and ratios of them are properties."""

    draft_tokens: int
    edges: tuple[int, ...] = LENGTH_BUCKETS
    """Positions that separate the buckets, ascending; B is one more than they are."""
    members: int = 1
    """C, the conversations that are counted."""
    conversations: int = 0
    """How many of them were counted so far."""
    by_conversation: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0, 2), np.int64))
    """[C, B, 2]: verify steps of each conversation by the bucket of the position where they start, and their tokens."""
    proposals: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[draft_tokens], by k: verify steps whose first k draft tokens were accepted and whose turn goes on."""
    accepted: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[draft_tokens], by k: the verify steps of `proposals` whose next draft token was accepted too."""
    teacher_positions: int = 0
    agreements: int = 0
    """Teacher positions whose realised token is the verifier's argmax."""

    def __post_init__(self) -> None:
        if self.proposals.size == 0:
            self.proposals = np.zeros(self.draft_tokens, np.int64)
            self.accepted = np.zeros(self.draft_tokens, np.int64)
            self.by_conversation = np.zeros((self.members, len(self.edges) + 1, 2), np.int64)

    @property
    def verify_steps(self) -> int:
        """Verify steps of all conversations."""
        return int(self.by_conversation[..., 0].sum())

    @property
    def tokens(self) -> int:
        """Tokens that the verify steps produced: all tokens of each turn but its first."""
        return int(self.by_conversation[..., 1].sum())

    @property
    def acceptance_length(self) -> float:
        """Tokens per verify step along the chain, the token of the verifier included; 1 means no gain."""
        return self.tokens / max(1, self.verify_steps)

    @property
    def conditional(self) -> list[float]:
        """Acceptance rate of each draft token along the chain, given that the draft tokens before it were accepted."""
        return [float(hit) / max(1, int(tried)) for hit, tried in zip(self.accepted, self.proposals, strict=True)]

    @property
    def greedy_agreement(self) -> float:
        """Share of realised tokens that are the verifier's argmax; 1 on text that it wrote greedily."""
        return self.agreements / max(1, self.teacher_positions)

    @property
    def kind(self) -> str:
        """Exact where every realised token is the verifier's argmax; otherwise teacher-forced, with their share.

        A single other token means that the counts past it are not those of serving this verifier.
        """
        if self.agreements == self.teacher_positions:
            return "exact"
        # Rounded down, so that 100 % is never said of less.
        return f"teacher-forced ({math.floor(self.greedy_agreement * 10_000) / 100:.2f} % greedy)"

    def to_json(self) -> dict[str, Any]:
        """Return the figures for reports. `kind` says whether they are exact, or how far the text is from greedy."""
        return {
            "acceptance_length": self.acceptance_length,
            "conditional_acceptance": self.conditional,
            "proposals": self.proposals.tolist(),
            "accepted": self.accepted.tolist(),
            "verify_steps": self.verify_steps,
            "tokens": self.tokens,
            "conversations": self.conversations,
            "draft_tokens": self.draft_tokens,
            "greedy_agreement": self.greedy_agreement,
            "kind": self.kind,
        }


def count_chain(
    counts: AcceptanceCounts,
    starts: NDArray[np.int64],
    left: NDArray[np.int64],
    hits: NDArray[np.bool_],
    conversations: NDArray[np.int64] | None = None,
) -> None:
    """Walk the verify steps of all turns, and add them to `counts`.

    `starts` [S] int64 are the positions of the start rows, those of a turn one after the other. `left` [S] int64 are
    the tokens of the turn that follow each start row's verified token; numbers above draft_tokens + 1 count as that.
    `hits` [S, draft_tokens] bool says for each start row and step k whether the draft's argmax equals the verifier's.
    `conversations` [S] int64 are rows of `counts.by_conversation`; by default all start rows belong to the first one.
    Draft tokens beyond the end of the turn are not counted.
    """
    visited, taken, gains = walk_chain(left, hits)
    tried = np.minimum(np.minimum(taken + 1, counts.draft_tokens), left[visited])
    for sums, reached in ((counts.proposals, tried), (counts.accepted, taken)):
        sums += (reached[:, None] > np.arange(counts.draft_tokens)).sum(axis=0)
    members, buckets, _ = counts.by_conversation.shape
    cells = np.searchsorted(counts.edges, starts[visited], side="right")
    if conversations is not None:
        cells = cells + conversations[visited] * buckets
    flat = counts.by_conversation.reshape(members * buckets, 2)  # a view
    first, last = (int(cells.min()), int(cells.max()) + 1) if cells.size else (0, 0)
    steps = np.bincount(cells - first, minlength=last - first)
    gained = np.bincount(cells - first, weights=gains, minlength=last - first)
    flat[first:last] += np.stack((steps, gained.astype(np.int64)), axis=1)


def walk_chain(
    left: NDArray[np.int64], hits: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the verify steps of all turns as three arrays [N] int64, for the `left` and `hits` of `count_chain`.

    They are the start rows where verify steps start, the draft tokens that each accepts, and the tokens it produces.
    """
    usable = np.arange(hits.shape[1])[None, :] < left[:, None]
    accepted = np.cumprod(hits & usable, axis=1).sum(axis=1)
    gained = np.minimum(accepted + 1, left)
    # Only this walk goes step by step. The first start row of the next turn follows the last one of a turn.
    visited, number, jumps = [], 0, gained.tolist()
    while number < len(jumps):
        visited.append(number)
        number += jumps[number]
    rows = np.array(visited, np.int64)
    return rows, accepted[rows], gained[rows]
