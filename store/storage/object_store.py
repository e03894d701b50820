"""A store under a prefix of an object store (S3, Google Cloud Storage, Azure), through obstore.

Uploads of a shard go to `<directory>-<8 hex digits>/`, a name of their own for each attempt: object stores cannot
rename, and the commit record says which attempt counts. Two writers of one shard therefore never touch each other's
files, and what a killed one leaves behind is never read.
"""

from __future__ import annotations

import bisect
import itertools
import os
import time
import uuid
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias, TypeVar

from draftcache.store.common.errors import InputError, ShardDamagedError, StorageError, StoreNotFoundError
from draftcache.store.common.files import Buffer
from draftcache.store.storage.object_uploads import PART, UPLOAD, ObjectStage, flat
from draftcache.store.storage.obstore_module import TRIES, brief, is_final, load_obstore, when_forked

_T = TypeVar("_T")
Names: TypeAlias = list[str]  # inside the class, `list` is its method
Errors: TypeAlias = list[Exception]
_PARALLEL_READS = 8
_SCHEMES = ("s3", "gs", "az")
_HTTP_FLAGS = ("AWS_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP", "AZURE_ALLOW_HTTP")

_connected: weakref.WeakSet[ObjectStorage] = weakref.WeakSet()


def _forget_clients() -> list[Any]:
    """Let go of what a forked process inherited."""
    clients = [storage._client for storage in list(_connected)]
    for storage in list(_connected):
        storage._client = None
    return clients


when_forked(_forget_clients)


class ObjectStorage:
    """A prefix of a bucket: `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`.

    Credentials and addresses come from the environment, as obstore reads them. S3: AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL (servers other than Amazon's), web
    identity and instance roles. Google: GOOGLE_SERVICE_ACCOUNT or GOOGLE_APPLICATION_CREDENTIALS. Azure:
    AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or another of its credentials. AWS_ALLOW_HTTP=true
    (GOOGLE_ALLOW_HTTP, AZURE_ALLOW_HTTP) permits endpoints without TLS. Every client may be used by several threads,
    be pickled, and be used after a fork; an upload is finished by the process that started it.

    Failing requests are tried again: each up to `retries` times by obstore (5xx answers, broken connections, bodies
    that end early), with exponential backoff from `backoff` seconds on, and each call up to 3 times by us, which
    also covers what obstore must not repeat blindly. A request may take `request_timeout` seconds (set it for 8 MiB
    on the slowest link), a call `deadline` seconds and at most 3 request timeouts more; then StorageError.

    Uploads that a killed process left unfinished, or whose first answer was lost, stay in the bucket, unseen, until a
    lifecycle rule (AbortIncompleteMultipartUpload) removes them: set one.
    """

    def __init__(
        self,
        url: str,
        *,
        retries: int = 5,
        backoff: float = 0.1,
        request_timeout: float = 60.0,
        deadline: float = 300.0,
    ) -> None:
        """No request is made yet. Raises InputError for another URL, or where obstore is not installed."""
        scheme, _, rest = url.partition("://")
        if scheme not in _SCHEMES or not rest.strip("/") or rest.startswith("/"):
            raise InputError(f"{url}: expected s3://bucket/prefix, gs://bucket/prefix or az://container/prefix")
        self.local_root: Path | None = None
        self.url = url.rstrip("/")
        self.retries, self.backoff = retries, backoff
        self.request_timeout, self.deadline = request_timeout, deadline
        self._client: Any = None
        load_obstore(self.url)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_client": None}

    def describe(self, name: str = "") -> str:
        """See Storage."""
        return f"{self.url}/{name}" if name else self.url

    def size(self, name: str) -> int | None:
        """See Storage."""
        try:
            return int(self._call("look up", name, lambda obstore, client: obstore.head(client, name)["size"]))
        except StoreNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        """See Storage. Large objects are read by parallel ranges."""

        def get(obstore: Any, client: Any) -> tuple[int, bytes | None]:
            answer = obstore.get(client, name)
            size = int(answer.meta["size"])
            return size, bytes(answer.bytes()) if size <= PART else None

        size, data = self._call("read", name, get)
        if data is None:
            whole = bytearray(size)
            ObjectRangeFile(self, name, size).read_into(0, [memoryview(whole)])
            return bytes(whole)
        if len(data) != size:
            raise StorageError(f"{self.describe(name)}: expected {size} bytes, the answer held {len(data)}; try again")
        return data

    def open(self, name: str) -> ObjectRangeFile:
        """See Storage. One HEAD request."""
        size = self.size(name)
        if size is None:
            raise StoreNotFoundError(f"{self.describe(name)}: expected a file of the store, found nothing there")
        return ObjectRangeFile(self, name, size)

    def list(self, directory: str) -> Names:
        """See Storage."""
        return [name for name in self._names(directory) if not any(part.startswith(".") for part in name.split("/"))]

    def _names(self, directory: str) -> Names:
        def names(obstore: Any, client: Any) -> Names:
            pages = obstore.list(client, directory or None, chunk_size=1000)
            return sorted(item["path"] for page in pages for item in page)

        return self._call("list", directory, names)

    def put(self, name: str, data: Buffer) -> None:
        """See Storage."""
        body = bytes(flat(data))
        self._call("write", name, lambda obstore, client: obstore.put(client, name, body, **UPLOAD), writes=True)

    def create(self, name: str, data: Buffer) -> bool:
        """See Storage. A conditional PUT (If-None-Match: *, or the store's own condition).

        An answer may be lost after the object was written, and the PUT that is then repeated is told that the name
        is taken, by itself. So whenever it is taken, the object is read back: equal bytes count as ours, True. Two
        writers of identical bytes may therefore both see True; data that must tell them apart has to differ.
        After StorageError the object may or may not be there.
        """
        body = bytes(flat(data))

        def put(obstore: Any, client: Any) -> bool:
            try:
                obstore.put(client, name, body, mode="create")
            except (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError):
                # FileNotFoundError here: it was removed since, or another request was under way; then try again
                return bytes(obstore.get(client, name).bytes()) == body
            return True

        return self._call("create", name, put, writes=True)

    def put_file(self, name: str, path: Path) -> None:
        """See Storage. Streamed; memory holds a few parts of 8 MiB."""
        if not path.is_file():
            raise StoreNotFoundError(f"{path}: expected a file to upload, found nothing there")
        self._call("upload", name, lambda obstore, client: obstore.put(client, name, path, **UPLOAD), writes=True)

    def delete(self, name: str) -> None:
        """See Storage."""
        try:
            self._call("remove", name, lambda obstore, client: obstore.delete(client, name))
        except StoreNotFoundError:
            return  # S3 does not mind, the others say so

    def delete_directory(self, directory: str) -> None:
        """See Storage."""
        _in_parallel(self.delete, self._names(directory))

    def move_directory(self, source: str, target: str) -> None:
        """See Storage. Copies on the server, then removes; killed in between, both are there: move again."""

        def copy(name: str) -> None:
            new = target + name.removeprefix(source)
            self._call(f"copy to {new}", name, lambda obstore, client: obstore.copy(client, name, new))

        names = self._names(source)
        _in_parallel(copy, names)
        _in_parallel(self.delete, names)

    def stage(self, directory: str) -> ObjectStage:
        """See Storage. Leftovers of other attempts stay: they may be another writer's, at work right now."""
        return ObjectStage(self, f"{directory}-{uuid.uuid4().hex[:8]}")

    def lock(self, name: str, *, shared: bool = False) -> ObjectLock:
        """See Storage: always granted."""
        return ObjectLock()

    def connect(self) -> tuple[ModuleType, Any]:
        obstore = load_obstore(self.url)
        if self._client is None:
            # Options given here hide the environment's, so that AWS_ALLOW_HTTP has to be passed on.
            allow_http = any(os.environ.get(flag, "").lower() in ("1", "true", "yes") for flag in _HTTP_FLAGS)
            wait = timedelta(seconds=self.request_timeout)
            options = {"allow_http": allow_http, "timeout": wait, "connect_timeout": min(wait, _CONNECT)}
            retries = {
                "max_retries": self.retries,
                "retry_timeout": timedelta(seconds=self.deadline / TRIES),
                "backoff": {"init_backoff": timedelta(seconds=self.backoff), "max_backoff": _LONGEST_PAUSE},
            }
            try:
                self._client = obstore.store.from_url(self.url, client_options=options, retry_config=retries)
            except obstore.exceptions.BaseError as exc:
                raise InputError(
                    f"{self.url}: cannot be used as it is set up in the environment: {brief(exc)}"
                ) from exc
            _connected.add(self)
        return obstore, self._client

    def _call(self, doing: str, name: str, call: Callable[[Any, Any], _T], *, writes: bool = False) -> _T:
        """`call(obstore, client)`, up to 3 times. Raises StoreNotFoundError (of reads) and StorageError."""
        obstore, client = self.connect()
        started = time.monotonic()
        errors: Errors = []
        while len(errors) < TRIES and (not errors or time.monotonic() - started < self.deadline):
            if errors:
                time.sleep(self.backoff * 2 ** len(errors))
            try:
                return call(obstore, client)
            except FileNotFoundError as exc:
                if not writes:  # writes hear of lost multipart uploads, or of a missing bucket
                    raise StoreNotFoundError(
                        f"{self.describe(name)}: expected a file of the store, found nothing there ({brief(exc)})"
                    ) from exc
                errors.append(exc)
            except Exception as exc:
                errors.append(exc)
                if is_final(exc):
                    break
        raise StorageError(
            f"{self.describe(name)}: could not {doing} it: tried {len(errors)} times in "
            f"{time.monotonic() - started:.1f} s, each request up to {self.retries} times more; the last error: "
            f"{brief(errors[-1])}. What was committed before is untouched: check the connection, the credentials "
            "and the bucket's permissions, and run the same command again"
        ) from errors[-1]


_CONNECT = timedelta(seconds=10)
_LONGEST_PAUSE = timedelta(seconds=10)


class ObjectLock:
    """No lock: `ObjectStorage.create` decides who was first."""

    def release(self) -> None:
        """Nothing."""


class ObjectRangeFile:
    """An object, read by ranged GETs of up to 8 MiB, 8 at a time."""

    def __init__(self, storage: ObjectStorage, name: str, size: int) -> None:
        self._storage, self._name, self.size = storage, name, size

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """See RangeFile."""
        views = [buffer.cast("B") for buffer in buffers if buffer.nbytes]
        starts = [0, *itertools.accumulate(view.nbytes for view in views)]
        self._require(self.size, offset + starts[-1])

        def part(low: int) -> None:
            length = min(PART, starts[-1] - low)
            _scatter(self._fetch(offset + low, length), low, views, starts)

        _in_parallel(part, range(0, starts[-1], PART))

    def _fetch(self, offset: int, length: int) -> memoryview:
        def get(obstore: Any, client: Any) -> memoryview:
            data = memoryview(obstore.get_range(client, self._name, start=offset, length=length))
            if data.nbytes != length:
                raise OSError(f"the answer held {data.nbytes} of {length} bytes")
            return data

        try:
            return self._storage._call(f"read bytes {offset} to {offset + length} of", self._name, get)
        except StorageError:
            size = self._storage.size(self._name)
            if size is not None:
                self._require(size, offset + length)  # it was replaced by a shorter one
            raise

    def _require(self, size: int, end: int) -> None:
        if size < end:
            raise ShardDamagedError(
                f"{self._storage.describe(self._name)}: expected at least {end} bytes, found {size}; the file was cut"
            )

    def close(self) -> None:
        """Nothing is held."""


def _scatter(data: memoryview, position: int, views: Sequence[memoryview], starts: Sequence[int]) -> None:
    """Copy `data`, which begins at `position` of the views laid end to end (view i begins at starts[i])."""
    number = bisect.bisect_right(starts, position) - 1
    while data.nbytes:
        inside = position - starts[number]
        count = min(data.nbytes, views[number].nbytes - inside)
        views[number][inside : inside + count] = data[:count]
        data, position, number = data[count:], position + count, number + 1


def _in_parallel(call: Callable[[Any], None], items: Sequence[Any]) -> None:
    """`call` for every item, 8 at a time; raises the first error."""
    if len(items) <= 1:
        for item in items:
            call(item)
        return
    with ThreadPoolExecutor(min(len(items), _PARALLEL_READS)) as pool:
        futures = [pool.submit(call, item) for item in items]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
