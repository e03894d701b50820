"""The ring of host memory: stretches that are out never overlap, and room comes back in the order it was taken."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from draftcache.store.common.pinned_ring import ALIGNMENT, PinnedRing


def place(ring: PinnedRing, memory: torch.Tensor) -> int:
    return memory.data_ptr() - ring._memory.data_ptr()


def test_contents_survive_random_sizes_given_back_nearly_in_order() -> None:
    ring, draw = PinnedRing(ALIGNMENT * 40, pinned=False), np.random.default_rng(0)
    out: list[tuple[torch.Tensor, int]] = []
    refused = 0
    for number in range(3000):
        taken = ring.take(int(draw.integers(1, ALIGNMENT * 12)))
        if taken is None:
            refused += 1
            held, value = out.pop(int(draw.integers(min(2, len(out)))))
            assert bool((held == value).all())
            ring.give_back(held)
            continue
        taken.fill_(number % 251)
        out.append((taken, number % 251))
    assert 100 < refused < 2900
    for held, value in out:
        assert bool((held == value).all())
        ring.give_back(held)
    assert ring.take(ALIGNMENT * 40) is not None


def test_stretches_never_overlap_and_go_round() -> None:
    ring, draw = PinnedRing(100_000, pinned=False), np.random.default_rng(0)
    taken: list[torch.Tensor] = []
    refused = went_round = 0
    for _ in range(5000):
        memory = ring.take(int(draw.integers(1, 40_000)))
        if memory is None:
            refused += 1
            ring.give_back(taken.pop(0))
            continue
        first, end = place(ring, memory), place(ring, memory) + memory.numel()
        went_round += bool(taken) and first < place(ring, taken[-1])
        for other in taken:
            assert end <= place(ring, other) or place(ring, other) + other.numel() <= first
        assert 0 <= first < end <= 100_000
        assert first % ALIGNMENT == 0
        taken.append(memory)
    assert refused > 100 < went_round


def test_waiting_for_room() -> None:
    ring = PinnedRing(ALIGNMENT * 40, pinned=False)
    whole = ring.take(ALIGNMENT * 40)
    assert whole is not None
    assert ring.take(1) is None
    assert ring.take(ALIGNMENT * 41, wait=lambda: True) is None  # it would never fit, so nothing is waited for
    assert ring.waited_s == 0
    threading.Timer(0.1, ring.give_back, [whole]).start()
    assert ring.take(100, wait=lambda: True) is not None
    assert ring.waited_s > 0.04


def test_a_larger_stretch_goes_alone() -> None:
    ring = PinnedRing(ALIGNMENT * 4, pinned=False)
    small = ring.take(10)
    assert small is not None
    assert ring.take(ALIGNMENT * 5, larger_alone=True) is None
    ring.give_back(small)
    large = ring.take(ALIGNMENT * 5, larger_alone=True)
    assert large is not None
    assert large.numel() == ALIGNMENT * 5
    assert ring.take(1) is None
    ring.give_back(large)
    assert ring.take(1) is not None


def test_foreign_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="handed out"):
        PinnedRing(1000, pinned=False).give_back(torch.empty(10, dtype=torch.uint8))
