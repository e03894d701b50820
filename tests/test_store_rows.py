"""Row rules against their definitions, written out with loops."""

from __future__ import annotations

import numpy as np
import pytest

from draftcache.store.format.rows import rows_in_reach, run_lengths, start_rows, teacher_positions, tokens_left


def random_masks() -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    masks = [rng.random(length) < share for length in (1, 2, 3, 17, 60) for share in (0.0, 0.3, 0.8, 1.0)]
    return [np.asarray(mask) for mask in masks]


@pytest.mark.parametrize("mask", random_masks())
def test_rows_follow_their_definitions(mask: np.ndarray) -> None:
    length = len(mask)
    at = lambda j: bool(mask[j]) if 0 <= j < length else False  # noqa: E731
    starts = [t for t in range(length) if at(t + 1) and at(t + 2)]
    assert start_rows(mask).tolist() == starts
    for t, left in zip(starts, tokens_left(mask, np.array(starts, dtype=int)), strict=True):
        k = 0
        while at(t + 2 + k):
            k += 1
        assert left == k
    pairs = {t + 1 + k for t in starts for k in range(length) if all(at(t + 2 + i) for i in range(k + 1))}
    assert teacher_positions(mask).tolist() == sorted(pairs)
    for window in (1, 2, 5, None):
        expected = [t for t in range(length) if any(t <= s and (window is None or s < t + window) for s in starts)]
        assert rows_in_reach(mask, window).tolist() == expected


def test_run_lengths_end_at_the_mask_end() -> None:
    assert run_lengths(np.array([True, True, False, True])).tolist() == [2, 1, 0, 1, 0]
