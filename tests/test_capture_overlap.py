"""Batches by token budget; the bounded queue between computing and writing."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch

from draftcache.capture.job.batches import token_batches
from draftcache.capture.job.overlap import HostArrays, Writing


def test_batches_keep_the_budget_and_like_lengths_together() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 5000, 300).tolist()
    batches = token_batches(lengths, 8192)
    assert sorted(number for batch in batches for number in batch) == list(range(300))
    for batch in batches:
        longest = max(lengths[number] for number in batch)
        assert len(batch) == 1 or len(batch) * longest <= 8192
        assert min(lengths[number] for number in batch) >= 0.8 * longest
    padded = sum(len(batch) * max(lengths[number] for number in batch) for batch in batches)
    assert padded < 1.12 * sum(lengths)
    assert max(map(len, batches)) > 5
    assert token_batches(lengths, 8192) == batches
    assert token_batches([9000, 10, 12, 10], 8192) == [[1, 3, 2], [0]]
    flat = [number for batch in batches for number in batch]
    assert [lengths[number] for number in flat] == sorted(lengths)  # whatever the budget
    assert token_batches([], 8192) == []


def test_items_are_handled_in_order_and_no_more_than_the_limit_waits() -> None:
    waiting, most, handled = 0, 0, []
    lock = threading.Lock()

    def handle(item: int) -> None:
        nonlocal waiting
        time.sleep(0.002)
        handled.append(item)
        with lock:
            waiting -= 30

    writing = Writing(handle, 100)
    for item in range(40):
        writing.put(item, 30)
        with lock:
            waiting += 30
            most = max(most, waiting)
    writing.finish()
    assert handled == list(range(40))
    assert 60 <= most <= 120  # three wait, and one may have been handled but not yet counted
    alone = Writing(handled.append, 10)
    alone.put(99, 1000)  # larger than the limit: goes alone
    alone.finish()
    assert handled[-1] == 99


def test_an_error_comes_out_where_the_work_is_waited_for() -> None:
    def handle(item: int) -> None:
        if item == 3:
            raise ValueError("disk full")

    writing = Writing(handle, 1)

    def put_many() -> None:
        for item in range(50):
            writing.put(item, 1)

    with pytest.raises(ValueError, match="disk full"):
        put_many()
    with pytest.raises(ValueError, match="disk full"):
        writing.finish()
    writing = Writing(handle, 1000)
    for item in range(5):
        writing.put(item, 1)
    with pytest.raises(ValueError, match="disk full"):
        writing.finish()


def test_nothing_is_handled_after_it_was_abandoned() -> None:
    handled: list[int] = []
    started = threading.Event()

    def handle(item: int) -> None:
        started.set()
        time.sleep(0.05)
        handled.append(item)

    dropped: list[int] = []
    writing = Writing(handle, 1000, dropped.append)
    for item in range(10):
        writing.put(item, 1)
    started.wait()
    writing.abandon()
    assert handled == [0]
    assert dropped == list(range(1, 10))
    assert not writing.busy


def test_host_arrays_join_pieces() -> None:
    host = HostArrays(None)
    values = torch.arange(60, dtype=torch.uint8).view(20, 3)
    ids = torch.arange(7)
    host.add({"a": values[:5]}, {"a": 20, "b": 7})
    host.add({"a": values[5:6], "b": ids[:3]}, {"a": 20, "b": 7})
    host.add({"a": values[6:], "b": ids[3:]}, {"a": 20, "b": 7})
    assert host.nbytes == 60 + 56
    found = host.numpy()
    np.testing.assert_array_equal(found["a"], values.numpy())
    np.testing.assert_array_equal(found["b"], ids.numpy())
    short = HostArrays(None)
    short.add({"a": values[:5]}, {"a": 20})
    with pytest.raises(AssertionError):
        short.numpy()


def test_the_last_call_comes_after_every_item_unless_the_work_failed_or_was_abandoned() -> None:
    def failing(item: int) -> None:
        raise ValueError(f"disk full at {item}")

    seen: list[str] = []
    writing = Writing[int](lambda item: seen.append(f"item {item}"), 1000, last=lambda: seen.append("last"))
    for item in range(3):
        writing.put(item, 1)
    writing.close()
    writing.finish()
    assert seen == ["item 0", "item 1", "item 2", "last"]
    failed = Writing(failing, 1000, last=lambda: seen.append("never"))
    failed.put(0, 1)
    with pytest.raises(ValueError, match="disk full at 0"):
        failed.finish()
    Writing(failing, 1000, last=lambda: seen.append("never")).abandon()
    assert seen[-1] == "last"
    at_last = Writing[int](seen.append, 1000, last=lambda: failing(7))  # type: ignore[arg-type]
    at_last.close()
    with pytest.raises(ValueError, match="disk full at 7"):
        at_last.finish()
