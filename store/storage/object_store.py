"""A store under a prefix of an object store (S3, Google Cloud Storage, Azure), through obstore.

Each attempt at a shard uploads to another directory, `<directory>-<8 hex digits>/`, because object stores cannot
rename; the commit record says which attempt counts. Two writers of one shard therefore never touch each other's files,
and the files that a killed writer leaves behind are never read.
"""

from __future__ import annotations

import os
import time
import uuid
import weakref
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias, TypeVar

from draftcache.store.common.errors import InputError, StorageError, StoreNotFoundError
from draftcache.store.common.files import Buffer
from draftcache.store.storage.object_reads import ObjectRangeFile, in_parallel
from draftcache.store.storage.object_uploads import UPLOAD, ObjectStage, flat
from draftcache.store.storage.obstore_module import PART, TRIES, brief, is_final, load_obstore, when_forked

_T = TypeVar("_T")
Names: TypeAlias = list[str]  # inside the class, `list` is its method
Errors: TypeAlias = list[Exception]
_CONNECT = timedelta(seconds=10)
_LONGEST_PAUSE = timedelta(seconds=10)
_SCHEMES = ("s3", "gs", "az")
_HTTP_FLAGS = ("AWS_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP", "AZURE_ALLOW_HTTP")

_connected: weakref.WeakSet[ObjectStorage] = weakref.WeakSet()


def _forget_clients() -> list[Any]:
    """Have every storage give up the client that a forked process inherited, and return these clients."""
    clients = [storage._client for storage in list(_connected)]
    for storage in list(_connected):
        storage._client = None
    return clients


when_forked(_forget_clients)


class ObjectLock:
    """No lock at all: `ObjectStorage.create` decides who was first. Implements `Lock`."""

    def release(self) -> None:
        """Do nothing."""


class ObjectStorage:
    """A prefix of a bucket: `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`.

    Implements `Storage`.

    Credentials and addresses come from the environment, as obstore reads them. S3: AWS_ACCESS_KEY_ID,
    AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION, AWS_ENDPOINT_URL (servers other than Amazon's), web
    identity and instance roles. Google: GOOGLE_SERVICE_ACCOUNT or GOOGLE_APPLICATION_CREDENTIALS. Azure:
    AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY or another of its credentials. AWS_ALLOW_HTTP=true
    (GOOGLE_ALLOW_HTTP, AZURE_ALLOW_HTTP) permits endpoints without TLS. An object of this class may be used by several
    threads, be pickled, and be used after a fork; an upload is finished by the process that started it.

    Failing requests are tried again: obstore repeats each one up to `retries` times (after 5xx answers, broken
    connections, bodies that end early), with exponential backoff from `backoff` seconds on, and this class tries each
    call up to 3 times, which also covers requests that obstore must not repeat blindly. A request may take
    `request_timeout` seconds (set it for 8 MiB on the slowest link), a call `deadline` seconds and at most 3 request
    timeouts more. Then StorageError is raised. Answers that can't be right, such as a 404 for an object that a commit
    record names, are for the caller to ask for again, after each of `pauses` (seconds, from `backoff`).

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
        """Take the URL and the limits; no request is made yet.

        `retries` is a count; `backoff`, `request_timeout` and `deadline` are seconds. Raises InputError for a URL of
        another form, or where obstore is not installed.
        """
        scheme, _, rest = url.partition("://")
        if scheme not in _SCHEMES or not rest.strip("/") or rest.startswith("/"):
            raise InputError(f"{url}: expected s3://bucket/prefix, gs://bucket/prefix or az://container/prefix")
        self.local_root: Path | None = None
        self.url = url.rstrip("/")
        self.retries, self.backoff = retries, backoff
        self.request_timeout, self.deadline = request_timeout, deadline
        self.pauses = (2 * backoff, 8 * backoff)
        self._client: Any = None
        load_obstore(self.url)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_client": None}

    def describe(self, name: str = "") -> str:
        return f"{self.url}/{name}" if name else self.url

    def size(self, name: str) -> int | None:
        try:
            return int(self.call("look up", name, lambda obstore, client: obstore.head(client, name)["size"]))
        except StoreNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        """Read a whole object; one of more than 8 MiB is read by parallel ranges."""

        def get(obstore: Any, client: Any) -> tuple[int, bytes | None]:
            answer = obstore.get(client, name)
            size = int(answer.meta["size"])
            data = bytes(answer.bytes()) if size <= PART else None
            if data is not None and len(data) != size:
                raise OSError(f"the answer held {len(data)} of {size} bytes")
            return size, data

        size, data = self.call("read", name, get)
        if data is None:
            whole = bytearray(size)
            ObjectRangeFile(self, name, size).read_into(0, [memoryview(whole)])
            return bytes(whole)
        return data

    def open(self, name: str, *, size: int | None = None) -> ObjectRangeFile:
        """Open an object, for one HEAD request; for none where its size is given."""
        size = self.size(name) if size is None else size
        if size is None:
            raise StoreNotFoundError(f"{self.describe(name)}: expected a file of the store, found nothing there")
        return ObjectRangeFile(self, name, size)

    def list(self, directory: str) -> Names:
        return [*self.list_sizes(directory)]

    def list_sizes(self, directory: str) -> dict[str, int]:
        """Return the sizes of all objects below a directory by name, for one request per 1,000 objects."""
        found = self._objects(directory).items()
        return {name: size for name, size in found if not any(part.startswith(".") for part in name.split("/"))}

    def _objects(self, directory: str) -> dict[str, int]:
        """Return the sizes of all objects below a directory, hidden ones too, by name and in the names' order."""

        def sizes(obstore: Any, client: Any) -> dict[str, int]:
            pages = obstore.list(client, directory or None, chunk_size=1000)
            return dict(sorted((item["path"], int(item["size"])) for page in pages for item in page))

        return self.call("list", directory, sizes)

    def put(self, name: str, data: Buffer) -> None:
        body = bytes(flat(data))
        self.call("write", name, lambda obstore, client: obstore.put(client, name, body, **UPLOAD), writes=True)

    def create(self, name: str, data: Buffer) -> bool:
        """Write a whole object where there is none, by a conditional PUT (If-None-Match: *, or the store's form of it).

        An answer may be lost after the object was written; the repeated PUT is then refused because of the object that
        the first one wrote. So whenever a PUT is refused, the object is read back, and equal bytes count as written
        here: the result is True. Two writers of identical bytes may therefore both see True; data that must tell them
        apart has to differ. After StorageError the object may or may not be there.
        """
        body = bytes(flat(data))

        def put(obstore: Any, client: Any) -> bool:
            try:
                obstore.put(client, name, body, mode="create")
            except (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError):
                # FileNotFoundError here means that the object was removed since, or that another request was under
                # way. Then the call is tried again.
                return bytes(obstore.get(client, name).bytes()) == body
            return True

        return self.call("create", name, put, writes=True)

    def put_file(self, name: str, path: Path) -> None:
        """Upload a local file. It is streamed: memory holds a few parts of 8 MiB."""
        if not path.is_file():
            raise StoreNotFoundError(f"{path}: expected a file to upload, found nothing there")
        self.call("upload", name, lambda obstore, client: obstore.put(client, name, path, **UPLOAD), writes=True)

    def delete(self, name: str) -> None:
        try:
            self.call("remove", name, lambda obstore, client: obstore.delete(client, name))
        except StoreNotFoundError:
            return  # S3 does not report that there was no object, the other stores do

    def delete_directory(self, directory: str) -> None:
        in_parallel(self.delete, [*self._objects(directory)])

    def move_directory(self, source: str, target: str) -> None:
        """Copy every object on the server, then remove the old ones.

        A process that is killed in between leaves objects under both names: call this again.
        """

        def copy(name: str) -> None:
            new = target + name.removeprefix(source)
            self.call(f"copy to {new}", name, lambda obstore, client: obstore.copy(client, name, new))

        names = [*self._objects(source)]
        in_parallel(copy, names)
        in_parallel(self.delete, names)

    def stage(self, directory: str) -> ObjectStage:
        """Start an attempt under a new name. Other attempts' files stay: their writers may be at work right now."""
        return ObjectStage(self, f"{directory}-{uuid.uuid4().hex[:8]}")

    def lock(self, name: str, *, shared: bool = False) -> ObjectLock:
        """Grant the lock, always."""
        return ObjectLock()

    def connect(self) -> tuple[ModuleType, Any]:
        """Return the obstore module and this storage's client. Raises InputError for a set-up that cannot work."""
        obstore = load_obstore(self.url)
        if self._client is None:
            # Options that are given here hide those of the environment, so that AWS_ALLOW_HTTP has to be passed on.
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

    def call(self, doing: str, name: str, call: Callable[[Any, Any], _T], *, writes: bool = False) -> _T:
        """Return `call(obstore, client)`, which is tried up to 3 times. `doing` and `name` are for messages.

        Raises StoreNotFoundError where a call that does not write finds no object, and StorageError where no try
        succeeds.
        """
        obstore, client = self.connect()
        started = time.monotonic()
        errors: Errors = []
        while len(errors) < TRIES and (not errors or time.monotonic() - started < self.deadline):
            if errors:
                time.sleep(self.backoff * 2 ** len(errors))
            try:
                return call(obstore, client)
            except FileNotFoundError as exc:
                if not writes:  # for a write, this error means a lost multipart upload or a missing bucket
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
