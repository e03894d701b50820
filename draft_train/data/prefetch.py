"""Reading ahead: threads read micro-batches into host memory while drafts train, and one moves them to the devices.

On a GPU the copy and the decoding run on a separate stream, one micro-batch ahead, so that neither the device nor the
training loop waits for them. On the CPU the same threads do this without streams.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import fields
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from draftcache.draft_train.data.batches import Batch
from draftcache.draft_train.data.order import Schedule
from draftcache.draft_train.data.packed_batch import BatchLoader, PackedBatch
from draftcache.store.common.pinned_ring import PinnedRing, aligned
from draftcache.store.reader import StoreReader

_FEWEST_LOCAL_READERS, _MOST_LOCAL_READERS, REMOTE_READERS = 2, 4, 16
"""Threads that read, from a local store and from an object store. A thread reads 0.8 to 2.5 GB of taps a second, by the
processor, and a GPU that trains 100k tokens/s needs 1.6: with two threads, one H200's training waited for a fifth of
its time. An object store has a long latency, which many threads hide."""

_AHEAD_PER_READER = 4
"""Micro-batches that are read ahead per thread, unless the memory for them ends before."""
_AHEAD_ON_DEVICE = 1

_Place = tuple[int, torch.device]
"""A loader by its number, and the device that its batches go to."""


class Part(NamedTuple):
    """What a micro-batch is read from."""

    conversations: NDArray[np.int64]
    """[M] numbers of conversations."""
    loss_share: float
    """The share of each of them in the step's loss."""
    epoch: int = 0


class Prefetcher:
    """Provides the micro-batches of a store, in order, on `device`. It is a context manager, which ends its threads."""

    def __init__(
        self,
        store: StoreReader,
        loaders: Sequence[BatchLoader],
        parts: Iterable[Part],
        devices: Sequence[torch.device],
        *,
        most_bytes: int,
    ) -> None:
        """Provide, for each of `loaders`, its batch of every part on its device of `devices`.

        What several loaders need is read once, and loaders that make the same batches on one device share them.
        `most_bytes` of host memory hold the micro-batches read ahead; one that needs more is read alone.
        """
        self._parts, self._devices = iter(parts), list(dict.fromkeys(devices))
        by_key = {loader.key: loader for loader in loaders}
        self._loaders = list(by_key.values())
        keys = list(by_key)
        self._places = [(keys.index(loader.key), device) for loader, device in zip(loaders, devices, strict=True)]
        self.waited = 0.0
        """Seconds that all calls of `next_batch` together have waited for data."""
        self._memory = PinnedRing(most_bytes, pinned=any(device.type == "cuda" for device in devices))
        self._readers = reader_threads(store)
        self._opened = [store.another() for _ in range(self._readers)]
        self._stores: queue.SimpleQueue[StoreReader] = queue.SimpleQueue()
        for opened in self._opened:
            self._stores.put(opened)
        self._ready: queue.SimpleQueue[dict[_Place, Batch] | BaseException] = queue.SimpleQueue()
        self._room = threading.Semaphore(_AHEAD_ON_DEVICE)
        self._closed = threading.Event()
        self._asked: dict[torch.device, torch.cuda.Event] = {}
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

    def next_batches(self) -> list[Batch]:
        """Return the next micro-batch of every loader. Raises the error that reading it raised, or EOFError at the end.

        On a GPU this first waits until the device has done all work that was queued before the previous call. Nothing
        else keeps the host from queueing passes far ahead, each with a micro-batch in the device's memory.
        """
        gpus = [device for device in self._devices if device.type == "cuda"]
        before, self._asked = self._asked, {gpu: torch.cuda.current_stream(gpu).record_event() for gpu in gpus}
        for event in before.values():
            event.synchronize()
        started = time.monotonic()
        self._room.release()
        found = self._ready.get()
        self.waited += time.monotonic() - started
        if isinstance(found, BaseException):
            raise found
        for (_, device), batch in found.items():
            if device.type == "cuda":
                _record_use(batch, torch.cuda.current_stream(device))
        return [found[place] for place in self._places]

    def next_batch(self) -> Batch:
        """Return the next micro-batch of the only loader; see `next_batches`."""
        (batch,) = self.next_batches()
        return batch

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
        waiting: deque[tuple[torch.Tensor, Future[list[PackedBatch]]]] = deque()
        streams = {
            device: torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for device in self._devices
            if device.type == "cuda"
        }
        part = next(self._parts, None)
        while not self._closed.is_set():
            while part is not None and len(waiting) < _AHEAD_PER_READER * self._readers:
                memory = self._memory.take(sum(self._sizes(part.conversations)), larger_alone=True)
                if memory is None:
                    break
                waiting.append((memory, pool.submit(self._read, part, memory)))
                part = next(self._parts, None)
            if not waiting:
                return
            memory, future = waiting.popleft()
            packed = future.result()
            self._room.acquire()
            if self._closed.is_set():
                return
            self._ready.put({place: self._unpack(packed[place[0]], place[1], streams) for place in set(self._places)})
            self._memory.give_back(memory)

    def _sizes(self, numbers: NDArray[np.int64]) -> list[int]:
        """Return the bytes of host memory for the micro-batch of each loader, [loaders]."""
        return [aligned(loader.most_bytes(numbers)) for loader in self._loaders]

    def _read(self, wanted: Part, memory: torch.Tensor) -> list[PackedBatch]:
        store = self._stores.get()
        try:
            with store.keeping_arrays() if len(self._loaders) > 1 else nullcontext():
                return [
                    loader.read(store, wanted.conversations, wanted.loss_share, part, wanted.epoch)
                    for loader, part in zip(
                        self._loaders, torch.split(memory, self._sizes(wanted.conversations)), strict=True
                    )
                ]
        finally:
            self._stores.put(store)

    def _unpack(
        self, packed: PackedBatch, device: torch.device, streams: Mapping[torch.device, torch.cuda.Stream]
    ) -> Batch:
        """Return the batch, complete on the device. This thread waits for the copy, so that no other thread has to."""
        codec = self._loaders[0].codec
        if device not in streams:
            return packed.unpack(codec, device)
        with torch.cuda.stream(streams[device]):
            batch = packed.unpack(codec, device)
        streams[device].synchronize()
        return batch


def _record_use(batch: Batch, stream: torch.cuda.Stream) -> None:
    """Keep the allocator from reusing a batch's memory, which belongs to another stream, before this one is done."""
    for item in fields(batch):
        if isinstance(value := getattr(batch, item.name), torch.Tensor):
            value.record_stream(stream)


def local_readers() -> int:
    """Return how many threads of this process read a local store: half of its share of the machine's cores, 2 to 4."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # torchrun sets it
    cores = (os.cpu_count() or 1) // ranks
    return min(max(cores // 2, _FEWEST_LOCAL_READERS), _MOST_LOCAL_READERS)


def reader_threads(store: StoreReader) -> int:
    """Return how many threads of this process read a store."""
    return local_readers() if store.storage.local_root is not None else REMOTE_READERS


def ring_bytes(store: StoreReader, loaders: Sequence[BatchLoader], schedule: Schedule, most: int) -> int:
    """Return the bytes of host memory for reading ahead: `most`, or less if all that is ever read ahead needs less."""
    distinct = {loader.key: loader for loader in loaders}.values()
    sizes = np.sum([loader.bytes[schedule.members] for loader in distinct], axis=0)
    per_token = float((sizes / schedule.tokens[schedule.members]).max())
    alone = int(sizes.max())
    largest = max(alone, min(int(per_token * schedule.pack_tokens), alone * schedule.batch_conversations))
    return min(most, min(int(sizes.sum()), _AHEAD_PER_READER * reader_threads(store) * largest) + (1 << 20))
