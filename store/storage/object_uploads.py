"""Uploads of a shard's files to an object store, while they are written."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from draftcache.store.common.errors import StorageError
from draftcache.store.common.files import Buffer
from draftcache.store.storage.obstore_module import TRIES, brief, is_final

if TYPE_CHECKING:
    from draftcache.store.storage.object_store import ObjectStorage

PART = 8 << 20  # bytes per uploaded part; S3 allows 10,000 parts, so files of up to 84 GB
UPLOAD = {"chunk_size": PART, "max_concurrency": 2}  # a shard writes all its arrays at once: 2 parts each is plenty


class ObjectStage:
    """An attempt's directory: its name is final, and unknown to readers until a commit record names it."""

    def __init__(self, storage: ObjectStorage, directory: str) -> None:
        self._storage, self._directory = storage, directory
        self._files: list[ObjectStageFile] = []

    def open(self, name: str) -> ObjectStageFile:
        """See Stage."""
        self._files.append(ObjectStageFile(self._storage, f"{self._directory}/{name}"))
        return self._files[-1]

    def publish(self) -> str:
        """See Stage. Everything is in place already; returns the attempt's directory."""
        for file in self._files:
            file.close()
        return self._directory

    def abandon(self) -> None:
        """See Stage. What a dead connection keeps from being removed is left: nothing will ever name it."""
        for file in self._files:
            file.abort()
        with contextlib.suppress(StorageError):
            self._storage.delete_directory(self._directory)


class ObjectStageFile:
    """An object uploaded while it is written: in parts of 8 MiB, at most 5 in memory; a small one by a single PUT."""

    def __init__(self, storage: ObjectStorage, name: str) -> None:
        self._storage, self._name = storage, name
        self._buffer = bytearray()
        self._bytes = 0
        self._parts: queue.Queue[bytes | None] = queue.Queue(maxsize=1)
        self._upload: Future[None] | None = None
        self._begun = False
        self._aborted = threading.Event()
        self._whole = False
        self._settled = False

    def write(self, buffers: Sequence[Buffer]) -> None:
        """See StageFile."""
        for item in buffers:
            view = flat(item)
            self._bytes += view.nbytes
            while view.nbytes:
                if len(self._buffer) == PART:
                    self._send(bytes(self._buffer))
                    self._buffer.clear()
                room = PART - len(self._buffer)
                self._buffer += view[:room]
                view = view[room:]

    def close(self) -> None:
        """See StageFile."""
        if self._settled:
            return
        if self._upload is None:
            self._storage.put(self._name, self._buffer)
        else:
            if not self._whole:
                self._send(bytes(self._buffer))
                self._send(None)
                self._whole = True
            self._finish(self._upload)
        self._settled = True

    def abort(self) -> None:
        """Give up; the parts that were uploaded are removed on the server."""
        self._settled = True
        self._aborted.set()
        if self._upload is not None:
            self._upload.exception()

    def _send(self, part: bytes | None) -> None:
        if self._upload is None:
            self._storage.connect()
            self._upload = Future()
            threading.Thread(target=self._stream, args=(self._upload,)).start()
        while not self._upload.done():
            with contextlib.suppress(queue.Full):
                self._parts.put(part, timeout=0.1)
                return
        self._finish(self._upload)

    def _stream(self, upload: Future[None]) -> None:
        obstore, client = self._storage.connect()
        for tries in itertools.count(1):
            try:
                obstore.put(client, self._name, self._queued(), use_multipart=True, **UPLOAD)
            except BaseException as exc:
                if not self._begun and tries < TRIES and isinstance(exc, Exception) and not is_final(exc):
                    time.sleep(self._storage.backoff * 2**tries)
                    continue  # the upload could not be begun, no part is lost yet
                upload.set_exception(exc)
            else:
                upload.set_result(None)
            return

    def _queued(self) -> Iterator[bytes]:
        """The parts as they come. An error out of here makes obstore abort the upload on the server.

        So a program that ends with an open upload neither hangs nor leaves parts behind. (An executor's thread would
        hang: executors are joined before the main thread counts as ended.)
        """
        while not self._aborted.is_set() and threading.main_thread().is_alive():
            with contextlib.suppress(queue.Empty):
                part = self._parts.get(timeout=0.1)
                self._begun = True
                if part is None:
                    return
                yield part
        raise InterruptedError("the upload was given up")

    def _finish(self, upload: Future[None]) -> None:
        """Wait for the upload; a failed one stands if all its bytes arrived and only the answer was lost."""
        error = upload.exception()
        if error is None or (self._whole and self._storage.size(self._name) == self._bytes):
            return
        raise StorageError(
            f"{self._storage.describe(self._name)}: the upload broke off ({brief(error)}), each request was tried "
            f"up to {self._storage.retries} times more. Nothing of it was committed: run the same command again"
        ) from error


def flat(item: Buffer) -> memoryview:
    """The bytes of a contiguous buffer."""
    view = memoryview(item)
    return view.cast("B") if view.nbytes else memoryview(b"")
