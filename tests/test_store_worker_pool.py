"""Worker processes start whole, leave signals to their parent, and end with it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from draftcache.store.common.stopping import signals_held_back
from draftcache.store.common.worker_pool import WorkerPool
from support.processes import wait_for


@pytest.fixture
def second_thread() -> Iterator[None]:
    """A thread that blocks no signal, as libraries have them: it receives what the main thread blocks."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    yield
    done.set()
    thread.join()


@pytest.fixture
def interruptible() -> Iterator[None]:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def interrupt_and_go_on(passed: list[str]) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(100):  # Python handles a signal between two instructions
        time.sleep(0.001)
    passed.append("started")


@pytest.mark.usefixtures("second_thread", "interruptible")
def test_ctrl_c_waits_until_a_process_is_started() -> None:
    passed: list[str] = []
    with pytest.raises(KeyboardInterrupt), signals_held_back():
        interrupt_and_go_on(passed)
    assert passed == ["started"]


@pytest.mark.usefixtures("second_thread", "interruptible")
def test_a_mask_alone_would_not_make_it_wait() -> None:
    """Negative control: the other thread receives the signal, and the main thread raises in the middle."""
    passed: list[str] = []
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupt_and_go_on(passed)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    assert passed == []


@pytest.mark.usefixtures("interruptible")
def test_handlers_and_mask_are_as_before() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with signals_held_back():
        assert {signal.SIGINT, signal.SIGTERM} <= signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask


@pytest.mark.usefixtures("second_thread")
def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """A shell ignores SIGINT in what it runs in the background."""
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    passed: list[str] = []
    try:
        with signals_held_back():
            interrupt_and_go_on(passed)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert passed == ["started"]


@pytest.mark.usefixtures("interruptible")
def test_other_threads_may_start_processes_too() -> None:
    """Only the main thread can set handlers, and only it is interrupted."""
    results: list[int] = []

    def use() -> None:
        with WorkerPool(1) as pool:
            results.append(pool.submit(os.getpid).result(timeout=60))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join(timeout=60)
    assert len(results) == 1
    assert results[0] != os.getpid()


@pytest.mark.usefixtures("interruptible")
def test_an_error_ends_the_processes_at_once_and_ctrl_c_does_not() -> None:
    numbers: list[int] = []

    def work() -> None:
        with WorkerPool(1) as pool:
            numbers.append(pool.submit(os.getpid).result(timeout=60))
            os.kill(numbers[0], signal.SIGINT)
            numbers.append(pool.submit(os.getpid).result(timeout=60))
            pool.submit(time.sleep, 600.0)
            raise RuntimeError("reason")

    with pytest.raises(RuntimeError, match="reason"):
        work()
    assert numbers[0] == numbers[1]
    wait_for(lambda: not Path(f"/proc/{numbers[0]}").exists())
