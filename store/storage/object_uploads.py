"""Uploads of a shard's files to an object store, while they are written."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from types import ModuleType
from typing import Any, Protocol

from draftcache.store.common.errors import StorageError
from draftcache.store.common.files import Buffer
from draftcache.store.storage.obstore_module import PART, TRIES, brief, is_final

UPLOAD = {"chunk_size": PART, "max_concurrency": 2}
"""Settings of an upload in parts. A shard writes all its arrays at once, so 2 parts of each at a time are plenty."""


class WritableObjects(Protocol):
    """What an upload needs of the object storage."""

    retries: int
    """How often obstore tries a request again."""
    backoff: float
    """Seconds before the first repetition."""

    def describe(self, name: str = "") -> str:
        """Return the URL of a name, for messages."""

    def connect(self) -> tuple[ModuleType, Any]:
        """Return the obstore module and its client."""

    def size(self, name: str) -> int | None:
        """Return the bytes of an object, or None where there is none."""

    def put(self, name: str, data: Buffer) -> None:
        """Write a whole object."""

    def delete_directory(self, directory: str) -> None:
        """Remove all objects below a directory."""


class ObjectStage:
    """An attempt's directory. Implements `Stage`.

    The directory has its final name from the start. Readers do not know the name until a commit record holds it.
    """

    def __init__(self, storage: WritableObjects, directory: str) -> None:
        self._storage, self._directory = storage, directory
        self._files: list[ObjectStageFile] = []

    def open(self, name: str) -> ObjectStageFile:
        self._files.append(ObjectStageFile(self._storage, f"{self._directory}/{name}"))
        return self._files[-1]

    def publish(self, is_committed: Callable[[], bool]) -> str:
        """Finish the uploads and return the attempt's directory: nothing has to be renamed."""
        for file in self._files:
            file.close()
        return self._directory

    def settle(self) -> None:
        """Nothing is left: an attempt has no other objects than those it publishes."""

    def abandon(self) -> None:
        """Abort the uploads and remove the directory.

        Objects that a dead connection keeps from being removed stay: no commit record will ever name them.
        """
        for file in self._files:
            file.abort()
        with contextlib.suppress(StorageError):
            self._storage.delete_directory(self._directory)


class ObjectStageFile:
    """An object that is uploaded while it is written. Implements `StageFile`.

    It goes up in parts of 8 MiB, of which at most 5 are in memory. An object of one part or less is one PUT.
    """

    def __init__(self, storage: WritableObjects, name: str) -> None:
        self._storage, self._name = storage, name
        self._buffer = bytearray()
        self._bytes = 0
        self._parts: queue.Queue[bytes | None] = queue.Queue(maxsize=1)
        """Parts for the uploading thread; None ends the object."""
        self._upload: Future[None] | None = None
        self._begun = False
        """Whether a part has gone to obstore: from then on the upload can't be begun again."""
        self._aborted = threading.Event()
        self._whole = False
        """Whether the last part has gone to the uploading thread."""
        self._settled = False

    def write(self, buffers: Sequence[Buffer]) -> None:
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
        """Give the upload up. The server removes the parts that it has received."""
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
                    continue  # the upload could not be begun, so no part is lost yet
                upload.set_exception(exc)
            else:
                upload.set_result(None)
            return

    def _queued(self) -> Iterator[bytes]:
        """Yield the parts as they come. An error raised here makes obstore abort the upload on the server.

        So a program that ends with an open upload neither hangs nor leaves parts behind. (An executor's thread would
        hang, because executors are joined before the main thread counts as ended.)
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
        """Wait for the upload. A failed one counts where all its bytes arrived and only the answer was lost."""
        error = upload.exception()
        if error is None or (self._whole and self._storage.size(self._name) == self._bytes):
            return
        raise StorageError(
            f"{self._storage.describe(self._name)}: the upload broke off ({brief(error)}), each request was tried "
            f"up to {self._storage.retries} times more. Nothing of it was committed: run the same command again"
        ) from error


def flat(item: Buffer) -> memoryview:
    """Return the bytes of a contiguous buffer, without a copy."""
    view = memoryview(item)
    return view.cast("B") if view.nbytes else memoryview(b"")
