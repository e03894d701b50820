"""Reading ahead: threads read micro-batches into host memory while the draft trains, and one moves them to the device.

On a GPU the copy and the decoding run on a separate stream, one micro-batch ahead, so that neither the device nor the
training loop waits for them. On the CPU the same threads do this without streams.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from types import TracebackType
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from draftcache.draft_train.data.batches import Batch
from draftcache.draft_train.data.order import Schedule
from draftcache.draft_train.data.packed_batch import BatchLoader, PackedBatch
from draftcache.store.common.pinned_ring import PinnedRing
from draftcache.store.reader import StoreReader

LOCAL_READERS, REMOTE_READERS = 2, 16
"""Threads that read, from a local store and from an object store. One thread decompresses 2.5 GB of taps a second, and
a GPU that trains 100k tokens/s reads 1.6. An object store has a long latency, which many threads hide."""

_AHEAD_PER_READER = 4
"""Micro-batches that are read ahead per thread, unless the memory for them ends before."""
_AHEAD_ON_DEVICE = 1

Part = tuple[NDArray[np.int64], float]
"""The conversations of a micro-batch [M] int64, and the share of each in the step's loss."""


class Prefetcher:
    """Provides the micro-batches of a store, in order, on `device`. It is a context manager, which ends its threads."""

    def __init__(
        self, store: StoreReader, loader: BatchLoader, parts: Iterable[Part], device: torch.device, *, most_bytes: int
    ) -> None:
        """`most_bytes` of host memory hold the micro-batches read ahead; one that needs more is read alone."""
        self._loader, self._parts, self._device = loader, iter(parts), device
        self.waited = 0.0
        """Seconds that all calls of `next_batch` together have waited for data."""
        self._memory = PinnedRing(most_bytes, pinned=device.type == "cuda")
        self._readers = _readers(store)
        self._opened = [store.another() for _ in range(self._readers)]
        self._stores: queue.SimpleQueue[StoreReader] = queue.SimpleQueue()
        for opened in self._opened:
            self._stores.put(opened)
        self._ready: queue.SimpleQueue[Batch | BaseException] = queue.SimpleQueue()
        self._room = threading.Semaphore(_AHEAD_ON_DEVICE)
        self._closed = threading.Event()
        self._asked: torch.cuda.Event | None = None
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()
        self._room.release()
        self._thread.join()

    def next_batch(self) -> Batch:
        """Return the next micro-batch. Raises the error that reading it raised, or EOFError where there is none.

        On a GPU this first waits until the device has done all work that was queued before the previous call. Nothing
        else keeps the host from queueing passes far ahead, each with a micro-batch in the device's memory.
        """
        if self._device.type == "cuda":
            before, self._asked = self._asked, torch.cuda.current_stream(self._device).record_event()
            if before is not None:
                before.synchronize()
        started = time.monotonic()
        self._room.release()
        found = self._ready.get()
        self.waited += time.monotonic() - started
        if isinstance(found, BaseException):
            raise found
        if self._device.type == "cuda":
            stream = torch.cuda.current_stream(self._device)
            for item in fields(found):  # made on another stream: its allocator must not reuse their memory too soon
                if isinstance(value := getattr(found, item.name), torch.Tensor):
                    value.record_stream(stream)
        return found

    def _run(self) -> None:
        try:
            with ThreadPoolExecutor(self._readers, thread_name_prefix="read") as pool:
                try:
                    self._serve(pool)
                finally:
                    pool.shutdown(wait=False, cancel_futures=True)
            self._ready.put(EOFError("every micro-batch was taken"))
        except BaseException as exc:  # `next_batch` raises it
            self._ready.put(exc)
        finally:
            for opened in self._opened:
                opened.close()

    def _serve(self, pool: ThreadPoolExecutor) -> None:
        waiting: deque[tuple[torch.Tensor, Future[PackedBatch]]] = deque()
        stream = None
        if self._device.type == "cuda":
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        part = next(self._parts, None)
        while not self._closed.is_set():
            while part is not None and len(waiting) < _AHEAD_PER_READER * self._readers:
                memory = self._memory.take(self._loader.most_bytes(part[0]), larger_alone=True)
                if memory is None:
                    break
                waiting.append((memory, pool.submit(self._read, *part, memory)))
                part = next(self._parts, None)
            if not waiting:
                return
            memory, future = waiting.popleft()
            packed = future.result()
            self._room.acquire()
            if self._closed.is_set():
                return
            self._ready.put(self._unpack(packed, stream))
            self._memory.give_back(memory)

    def _read(self, numbers: NDArray[np.int64], loss_share: float, memory: torch.Tensor) -> PackedBatch:
        store = self._stores.get()
        try:
            return self._loader.read(store, numbers, loss_share, memory)
        finally:
            self._stores.put(store)

    def _unpack(self, packed: PackedBatch, stream: torch.cuda.Stream | None) -> Batch:
        """Return the batch, complete on the device. This thread waits for the copy, so that no other thread has to."""
        if stream is None:
            return packed.unpack(self._loader.codec, self._device)
        with torch.cuda.stream(stream):
            batch = packed.unpack(self._loader.codec, self._device)
        stream.synchronize()
        return batch


def _readers(store: StoreReader) -> int:
    return LOCAL_READERS if store.storage.local_root is not None else REMOTE_READERS


def ring_bytes(store: StoreReader, loader: BatchLoader, schedule: Schedule, most: int) -> int:
    """Return the bytes of host memory for reading ahead: `most`, or less if all that is ever read ahead needs less."""
    sizes = loader.bytes[schedule.members]
    per_token = float((sizes / schedule.tokens[schedule.members]).max())
    alone = int(sizes.max())
    largest = max(alone, min(int(per_token * schedule.pack_tokens), alone * schedule.batch_conversations))
    return min(most, min(int(sizes.sum()), _AHEAD_PER_READER * _readers(store) * largest) + (1 << 20))
