"""Acceptance by position and by length of the conversation, and the difference between drafts, with intervals.

A verify step belongs to the bucket of the position where it starts, and to that of the length of its conversation.
The first answers what a longer context does to the draft, the second what longer conversations do, which differ in more
than in their length. `gap` is the acceptance length of a bucket over that of the shortest bucket with verify steps,
minus 1: the generalisation gap to longer contexts, negative where the draft loses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftcache.draft_train.acceptance import AcceptanceCounts
from draftcache.draft_train.intervals import LEVEL, RESAMPLES, interval, ratio, resampled_sums
from draftcache.store.common.errors import InputError

AXES = ("by_position", "by_length")


@dataclass(frozen=True)
class _Column:
    """Verify steps and tokens of one bucket, or of all: the sums, and their draws [resamples, 2]."""

    steps: int
    tokens: int
    conversations: int
    draws: NDArray[np.float64]

    @property
    def value(self) -> float:
        return self.tokens / max(1, self.steps)

    @property
    def values(self) -> NDArray[np.float64]:
        return ratio(self.draws[:, 1], self.draws[:, 0])

    @property
    def interval(self) -> list[float] | None:
        return interval(self.values, self.conversations)


def require_edges(edges: Sequence[int]) -> tuple[int, ...]:
    """Return the edges of the buckets. Raises InputError where they are not positive and ascending."""
    if not edges or any(b <= a for a, b in zip((0, *edges), edges, strict=False)):
        raise InputError(f"--length-buckets: expected ascending numbers of tokens above 0, found {list(edges)}")
    return tuple(edges)


def figures(
    found: Mapping[str, AcceptanceCounts],
    lengths: NDArray[np.int64],
    *,
    compare: Sequence[tuple[str, str]] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Return the figures of drafts on the same conversations as JSON values, by the draft's name.

    `lengths` [C] int64 are the tokens of the conversations. Each draft has the values of `AcceptanceCounts.to_json`,
    `interval` of its acceptance length, and `by_position` and `by_length`, lists of the buckets that have verify steps.
    With `compare`, pairs of names, `differences` is there too: for each pair `of` minus `minus`, in tokens per verify
    step, overall and by bucket. Raises InputError where not all drafts have the same buckets and conversations.
    """
    edges = next(iter(found.values())).edges
    if any(item.edges != edges or len(item.by_conversation) != len(lengths) for item in found.values()):
        raise InputError("expected drafts that were counted on the same conversations and buckets, found others")
    columns = _columns(found, lengths, edges, resamples, seed)
    bounds = [(first, last) for first, last in zip((0, *edges), (*edges, None), strict=True)]
    result: dict[str, Any] = {}
    for name, counts in found.items():
        whole = columns[name, "all"][0]
        result[name] = counts.to_json() | {"interval": whole.interval}
        for axis in AXES:
            result[name][axis] = _bucket_rows(columns[name, axis], bounds)
    if compare:
        result["differences"] = [_difference(columns, bounds, pair) for pair in compare]
    return result


def _columns(
    found: Mapping[str, AcceptanceCounts], lengths: NDArray[np.int64], edges: tuple[int, ...], resamples: int, seed: int
) -> dict[tuple[str, str], list[_Column]]:
    """Return the columns of each draft by (name, axis): one for "all", and one per bucket for each of AXES."""
    buckets = len(edges) + 1
    own = np.searchsorted(edges, lengths, side="right")
    tables: dict[tuple[str, str], NDArray[np.int64]] = {}
    for name, counts in found.items():
        whole = counts.by_conversation.sum(axis=1)
        by_length = np.zeros_like(counts.by_conversation)
        by_length[np.arange(len(lengths)), own] = whole
        tables |= {(name, "all"): whole[:, None], (name, "by_position"): counts.by_conversation}
        tables[name, "by_length"] = by_length
    flat = np.concatenate([table.reshape(len(lengths), -1) for table in tables.values()], axis=1)
    draws = resampled_sums(flat, resamples=resamples, seed=seed)
    result, first = {}, 0
    for key, table in tables.items():
        width = 1 if key[1] == "all" else buckets
        part = draws[:, first : first + 2 * width].reshape(resamples, width, 2)
        first += 2 * width
        result[key] = [
            _Column(
                steps=int(table[:, number, 0].sum()),
                tokens=int(table[:, number, 1].sum()),
                conversations=int((table[:, number, 0] > 0).sum()),
                draws=part[:, number],
            )
            for number in range(width)
        ]
    return result


def _bucket_rows(columns: list[_Column], bounds: list[tuple[int, int | None]]) -> list[dict[str, Any]]:
    """Return the buckets that have verify steps; the first of them is what `gap` of the others compares with."""
    filled = [(bound, column) for bound, column in zip(bounds, columns, strict=True) if column.steps]
    rows = []
    for number, ((first, last), column) in enumerate(filled):
        shortest = filled[0][1]
        both = min(column.conversations, shortest.conversations)
        gaps = ratio(column.values, shortest.values) - 1
        rows.append(
            {
                "from": first,
                "to": last,
                "conversations": column.conversations,
                "verify_steps": column.steps,
                "tokens": column.tokens,
                "acceptance_length": column.value,
                "interval": column.interval,
                "gap": column.value / shortest.value - 1 if number else None,
                "gap_interval": interval(gaps, both) if number else None,
            }
        )
    return rows


def _difference(
    columns: Mapping[tuple[str, str], list[_Column]], bounds: list[tuple[int, int | None]], pair: tuple[str, str]
) -> dict[str, Any]:
    """Return the paired difference of acceptance lengths between two drafts, overall and by bucket."""

    def of(mine: _Column, other: _Column) -> dict[str, Any]:
        return {
            "difference": mine.value - other.value,
            "interval": interval(mine.values - other.values, min(mine.conversations, other.conversations)),
        }

    result: dict[str, Any] = {"of": pair[0], "minus": pair[1], "level": LEVEL}
    result |= of(columns[pair[0], "all"][0], columns[pair[1], "all"][0])
    for axis in AXES:
        result[axis] = [
            {"from": first, "to": last} | of(mine, other)
            for (first, last), mine, other in zip(bounds, columns[pair[0], axis], columns[pair[1], axis], strict=True)
            if mine.steps and other.steps
        ]
    return result
