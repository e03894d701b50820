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
"""Positions that separate the buckets of `by_position`."""


@dataclass
class AcceptanceCounts:
    """Counts, summed over conversations. The ratios of them are properties."""

    draft_tokens: int
    conversations: int = 0
    verify_steps: int = 0
    tokens: int = 0
    """Tokens that the verify steps produced: all tokens of each turn but its first."""
    proposals: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[draft_tokens], by k: verify steps whose first k draft tokens were accepted and whose turn goes on."""
    accepted: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[draft_tokens], by k: the verify steps of `proposals` whose next draft token was accepted too."""
    bucket_steps: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(LENGTH_BUCKETS) + 1, np.int64))
    """Verify steps by the bucket of the position where they start. `bucket_tokens` are the tokens of these steps."""
    bucket_tokens: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(LENGTH_BUCKETS) + 1, np.int64))
    teacher_positions: int = 0
    agreements: int = 0
    """Teacher positions whose realised token is the verifier's argmax."""

    def __post_init__(self) -> None:
        if self.proposals.size == 0:
            self.proposals = np.zeros(self.draft_tokens, np.int64)
            self.accepted = np.zeros(self.draft_tokens, np.int64)

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
        edges = ["0", *map(str, LENGTH_BUCKETS), "inf"]
        return {
            "acceptance_length": self.acceptance_length,
            "conditional_acceptance": self.conditional,
            "verify_steps": self.verify_steps,
            "tokens": self.tokens,
            "conversations": self.conversations,
            "draft_tokens": self.draft_tokens,
            "greedy_agreement": self.greedy_agreement,
            "kind": self.kind,
            "by_position": {
                f"{edges[number]}-{edges[number + 1]}": float(tokens) / int(steps)
                for number, (steps, tokens) in enumerate(zip(self.bucket_steps, self.bucket_tokens, strict=True))
                if steps
            },
        }


def count_chain(
    counts: AcceptanceCounts, starts: NDArray[np.int64], left: NDArray[np.int64], hits: NDArray[np.bool_]
) -> None:
    """Walk the verify steps of all turns, and add them to `counts`.

    `starts` [S] int64 are the positions of the start rows, those of a turn one after the other. `left` [S] int64 are
    the tokens of the turn that follow each start row's verified token; numbers above draft_tokens + 1 count as that.
    `hits` [S, draft_tokens] bool says for each start row and step k whether the draft's argmax equals the verifier's.
    Draft tokens beyond the end of the turn are not counted.
    """
    usable = np.arange(counts.draft_tokens)[None, :] < left[:, None]
    accepted = np.cumprod(hits & usable, axis=1).sum(axis=1)
    gained = np.minimum(accepted + 1, left)
    # Only this walk goes step by step. The first start row of the next turn follows the last one of a turn.
    visited, number, jumps = [], 0, gained.tolist()
    while number < len(jumps):
        visited.append(number)
        number += jumps[number]
    taken, gains = accepted[visited], gained[visited]
    tried = np.minimum(np.minimum(taken + 1, counts.draft_tokens), left[visited])
    counts.verify_steps += len(visited)
    counts.tokens += int(gains.sum())
    for sums, reached in ((counts.proposals, tried), (counts.accepted, taken)):
        sums += (reached[:, None] > np.arange(counts.draft_tokens)).sum(axis=0)
    buckets = np.searchsorted(LENGTH_BUCKETS, starts[visited], side="right")
    counts.bucket_steps += np.bincount(buckets, minlength=len(counts.bucket_steps))
    counts.bucket_tokens += np.bincount(buckets, weights=gains, minlength=len(counts.bucket_tokens)).astype(np.int64)
