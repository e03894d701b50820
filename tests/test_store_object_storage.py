"""Object storage against a real S3 server on loopback and a failing one; LocalStorage keeps the same rules."""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import subprocess
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from botocore.exceptions import ClientError

from draftcache.store.common.errors import InputError, ShardDamagedError, StorageError, StoreNotFoundError
from draftcache.store.storage import obstore_module
from draftcache.store.storage.base import Storage, open_storage
from draftcache.store.storage.local import LocalStorage
from draftcache.store.storage.object_store import ObjectStorage
from draftcache.tools.campaign.fault_plans import SeededPlan
from draftcache.tools.campaign.object_server import BUCKET, CREDENTIALS, KINDS, FlakyProxy, Request, S3Server
from support.paths import ROOT

MIB = 1 << 20
Connect = Callable[..., ObjectStorage]


@pytest.fixture
def proxy(server: S3Server) -> Iterator[FlakyProxy]:
    with FlakyProxy(server.address, stall=0.9) as running:
        yield running


@pytest.fixture
def connect(proxy: FlakyProxy, monkeypatch: pytest.MonkeyPatch) -> Connect:
    """Storages under a prefix of the test's own, through the proxy, with retries made short."""
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": proxy.url, "AWS_ALLOW_HTTP": "true"}.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{BUCKET}/{uuid.uuid4().hex}"

    def make(**options: Any) -> ObjectStorage:
        quick = {"retries": 3, "backoff": 0.01, "request_timeout": 0.6, "deadline": 6.0}
        return ObjectStorage(url, **(quick | options))

    return make


@pytest.fixture(params=["object", "local"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return LocalStorage(tmp_path / "store")
    connect: Connect = request.getfixturevalue("connect")
    return connect(request_timeout=10.0)


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def key(storage: ObjectStorage, name: str = "") -> str:
    return storage.describe(name).removeprefix(f"s3://{BUCKET}/")


# What every storage keeps


def test_put_read_size_delete(storage: Storage) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    for data in (b"", b"abc", bytearray(b"de"), memoryview(b"fgh"), array.data):
        expected = memoryview(data).tobytes()
        storage.put("a/file", data)
        assert storage.read("a/file") == expected
        assert storage.size("a/file") == len(expected)
    storage.delete("a/file")
    storage.delete("a/file")
    assert storage.size("a/file") is None
    assert storage.describe("a/file").endswith("/a/file")


def test_missing_names(storage: Storage) -> None:
    for call in (storage.read, storage.open):
        with pytest.raises(StoreNotFoundError, match="no/such"):
            call("no/such")
    assert storage.size("no/such") is None
    assert storage.list("no") == []
    storage.delete_directory("no")


def test_create_never_overwrites(storage: Storage) -> None:
    assert storage.create("commit/0.json", b"first")
    assert not storage.create("commit/0.json", b"second")
    assert storage.read("commit/0.json") == b"first"


def test_of_racing_creates_one_wins(storage: Storage) -> None:
    for round_ in range(5):
        barrier = threading.Barrier(4)

        def race(writer: int, name: str = f"commit/{round_}", barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return storage.create(name, b"writer %d" % writer)

        with ThreadPoolExecutor(4) as pool:
            won = list(pool.map(race, range(4)))
        assert sum(won) == 1
        assert storage.read(f"commit/{round_}") == b"writer %d" % won.index(True)


def test_list_is_recursive_sorted_and_keeps_to_the_directory(storage: Storage) -> None:
    for name in ("b/2", "b/1/x/y", "bb/3", "a"):
        storage.put(name, b"")
    assert storage.list("b") == ["b/1/x/y", "b/2"]
    assert storage.list("") == ["a", "b/1/x/y", "b/2", "bb/3"]
    storage.put("b/2", b"four")
    assert list(storage.list_sizes("b").items()) == [("b/1/x/y", 0), ("b/2", 4)]
    assert storage.list_sizes("c") == {}
    storage.delete_directory("b")
    assert storage.list("") == ["a", "bb/3"]


def test_ranges_fill_the_buffers_in_order(storage: Storage) -> None:
    data = noise(20 * MIB + 7)
    storage.put("big", data)
    assert storage.read("big") == data
    file = storage.open("big")
    assert file.size == len(data)
    for offset, sizes in (
        (0, [len(data)]),
        (5, [1, 0, 9 * MIB, 3]),
        (len(data) - 4, [2, 2]),
        (len(data), [0]),
        (3, []),
    ):
        arrays = [np.empty(size, np.uint8) for size in sizes]
        file.read_into(offset, [array.data for array in arrays])
        assert b"".join(array.tobytes() for array in arrays) == data[offset : offset + sum(sizes)]
    matrix = np.empty((4, 6), np.uint16)
    file.read_into(1, [matrix.data])
    assert matrix.tobytes() == data[1:49]
    for offset in (len(data) - 1, len(data) + 5):
        with pytest.raises(ShardDamagedError, match=rf"big: expected at least {offset + 2} bytes"):
            file.read_into(offset, [memoryview(bytearray(2))])
    file.close()


def test_stage_and_publish(storage: Storage) -> None:
    """A large file in odd pieces from one reused buffer, small and empty files, in a nested place."""
    data = noise(18 * MIB + 5)
    stage = storage.stage("shards/00000")
    large, small, empty = stage.open("taps/c/0"), stage.open("zarr.json"), stage.open("empty")
    buffer = bytearray(1_000_003)
    for low in range(0, len(data), len(buffer)):
        count = len(data[low : low + len(buffer)])
        buffer[:count] = data[low : low + count]
        large.write([memoryview(buffer)[: count // 3], b"", memoryview(buffer)[count // 3 : count]])
        buffer[:] = bytes(len(buffer))  # the caller's memory is the caller's again
    small.write([b"{", bytearray(b"}"), np.array([7, 8], np.uint16).data])
    for file in (large, small, empty):
        file.close()
    directory = stage.publish(lambda: False)
    assert storage.list("shards") == [f"{directory}/{name}" for name in ("empty", "taps/c/0", "zarr.json")]
    assert storage.read(f"{directory}/taps/c/0") == data
    assert storage.read(f"{directory}/zarr.json") == b"{}\x07\x00\x08\x00"
    assert storage.read(f"{directory}/empty") == b""
    storage.move_directory(directory, "quarantine/00000")
    assert storage.list("shards") == []
    assert storage.read("quarantine/00000/taps/c/0") == data


def test_abandon_leaves_nothing(storage: Storage) -> None:
    stage = storage.stage("shards/00000")
    closed, half = stage.open("closed"), stage.open("half")
    closed.write([b"x"])
    closed.close()
    half.write([bytes(17 * MIB)])
    stage.abandon()
    assert storage.list("") == []
    half.close()
    assert storage.list("") == []


def test_put_file_and_lock(storage: Storage, tmp_path: Path) -> None:
    path = tmp_path / "source"
    path.write_bytes(noise(9 * MIB))
    storage.put("copy", b"older")
    storage.put_file("copy", path)
    assert storage.read("copy") == path.read_bytes()
    with pytest.raises(StoreNotFoundError, match="expected a file"):
        storage.put_file("copy", tmp_path / "nowhere")
    lock = storage.lock("writer")
    assert lock is not None
    lock.release()


# What an object store adds


def test_the_server_honours_conditional_writes(server: S3Server) -> None:
    """Otherwise the tests of `create` would prove nothing."""
    where = {"Bucket": BUCKET, "Key": "conditional"}
    server.client.put_object(**where, Body=b"first", IfNoneMatch="*")
    with pytest.raises(ClientError, match="PreconditionFailed"):
        server.client.put_object(**where, Body=b"second", IfNoneMatch="*")
    upload = {**where, "UploadId": server.client.create_multipart_upload(**where)["UploadId"]}
    tag = server.client.upload_part(**upload, PartNumber=1, Body=b"third")["ETag"]
    parts = {"Parts": [{"PartNumber": 1, "ETag": tag}]}
    with pytest.raises(ClientError, match="PreconditionFailed"):
        server.client.complete_multipart_upload(**upload, MultipartUpload=parts, IfNoneMatch="*")
    server.client.abort_multipart_upload(**upload)


def test_list_pages(server: S3Server, connect: Connect, proxy: FlakyProxy) -> None:
    storage = connect(request_timeout=10.0)
    names = [f"d/{number:04d}" for number in range(2_100)]
    server.fill(key(storage, name) for name in names)
    assert storage.list("d") == names
    assert len(proxy.log) == 3


def test_an_object_of_known_size_is_opened_without_a_question(connect: Connect, proxy: FlakyProxy) -> None:
    storage = connect()
    storage.put("file", b"data")
    proxy.log.clear()
    file, target = storage.open("file", size=4), bytearray(4)
    assert not proxy.log
    file.read_into(0, [memoryview(target)])
    assert (target, len(proxy.log)) == (b"data", 1)
    with pytest.raises(ShardDamagedError, match=r"gone: expected 4 bytes, found no file any more"):
        storage.open("gone", size=4).read_into(0, [memoryview(target)])


def test_attempts_do_not_touch_each_other(server: S3Server, connect: Connect) -> None:
    first, second = connect().stage("shards/00000"), connect().stage("shards/00000")
    for stage, data in ((first, b"one"), (second, b"two")):
        file = stage.open("file")
        file.write([data])
        file.close()
    directory = first.publish(lambda: False)
    second.publish(lambda: False)
    second.abandon()
    assert connect().list("shards") == [f"{directory}/file"]
    assert connect().read(f"{directory}/file") == b"one"


def test_parallel_ranged_reads(connect: Connect, proxy: FlakyProxy) -> None:
    storage = connect(request_timeout=10.0)
    data = noise(32 * MIB)
    storage.put("big", data)
    file = storage.open("big")
    proxy.log.clear()
    proxy.slow, proxy.plan = 0.2, lambda request: "slow"
    target = bytearray(len(data))
    file.read_into(0, [memoryview(target)])
    assert target == data
    ranges = sorted(tuple(map(int, str(request.range).removeprefix("bytes=").split("-"))) for request in proxy.log)
    assert ranges == [(low, low + 8 * MIB - 1) for low in range(0, 32 * MIB, 8 * MIB)]
    edges = sorted([(request.started, 1) for request in proxy.log] + [(request.ended, -1) for request in proxy.log])
    assert max(itertools.accumulate(step for _, step in edges)) >= 3


def test_uploads_hold_a_few_parts_only(connect: Connect) -> None:
    """Peak memory of a process of its own, obstore's share included."""
    storage = connect()
    code = f"""
from pathlib import Path
from draftcache.store.storage.object_store import ObjectStorage
peak = lambda: int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) >> 10
file = ObjectStorage({storage.url!r}).stage("d").open("file")
block = bytes(1 << 20)
before = peak()
for _ in range(128):
    file.write([block])
file.close()
print(peak() - before)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=20, check=True)
    assert 8 < int(result.stdout) < 80  # MiB


def seconds(call: Callable[[], object]) -> float:
    started = time.monotonic()
    call()
    return time.monotonic() - started


def workload(storage: ObjectStorage, path: Path) -> None:
    """Every operation once, every byte compared."""
    data = path.read_bytes()
    storage.put("manifest.json", b"manifest")
    assert storage.read("manifest.json") == b"manifest"
    assert storage.create("commit/0", b"record")
    assert not storage.create("commit/0", b"another")
    storage.put_file("tokenizer", path)
    assert storage.read("tokenizer") == data
    stage = storage.stage("shards/00000")
    files = [stage.open("taps"), stage.open("index")]
    for file, content in zip(files, (data, data[:100]), strict=True):
        file.write([content])
        file.close()
    directory = stage.publish(lambda: False)
    assert storage.list("") == ["commit/0", "manifest.json", f"{directory}/index", f"{directory}/taps", "tokenizer"]
    opened = storage.open(f"{directory}/taps")
    pieces = [bytearray(size) for size in (5, 9 * MIB, len(data) - 9 * MIB - 6)]
    opened.read_into(1, [memoryview(piece) for piece in pieces])
    assert b"".join(pieces) == data[1:]
    storage.move_directory(directory, "moved")
    assert storage.size("moved/taps") == len(data)
    assert storage.read("moved/index") == data[:100]
    storage.delete_directory("moved")
    storage.delete("tokenizer")
    assert storage.list("") == ["commit/0", "manifest.json"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_request_failing_once_does_no_harm(
    kind: str, server: S3Server, connect: Connect, proxy: FlakyProxy, tmp_path: Path
) -> None:
    """Every request of every operation meets the fault (of stalls, which cost 0.6 s each, one in eight)."""
    path, storage = tmp_path / "file", connect()
    path.write_bytes(noise(17 * MIB))
    undisturbed = seconds(lambda: workload(storage, path))
    storage.delete("commit/0")
    proxy.plan = SeededPlan(3, rate=0.12 if kind == "stall" else 1.0, most=1, kinds=(kind,))
    took = seconds(lambda: workload(storage, path))
    assert took < 10 * undisturbed + 2 * proxy.faults()["stall"] * storage.request_timeout
    assert proxy.faults()[kind] >= (3 if kind == "stall" else 25)
    if kind in ("error", "drop", "slow"):  # an upload whose first answer was lost has an id that nobody knows
        assert not [name for name in server.open_uploads() if name.startswith(key(connect()))]


@pytest.mark.parametrize("seed", [1, 2])
def test_a_flaky_server_does_no_harm(seed: int, connect: Connect, proxy: FlakyProxy, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(noise(17 * MIB, seed))
    proxy.plan = SeededPlan(seed, rate=0.4, most=2, kinds=tuple(kind for kind in KINDS if kind != "stall"))
    workload(connect(), path)
    assert sum(proxy.faults().values()) >= 15
    assert len(proxy.faults()) >= 4


def test_a_lost_answer_to_create_is_still_ours(connect: Connect, proxy: FlakyProxy) -> None:
    storage = connect()
    proxy.plan = SeededPlan(0, rate=1.0, most=1, kinds=("lose",))
    assert storage.create("commit/0", b"ours")
    assert [request.fault for request in proxy.log if request.conditional] == ["lose", None]
    proxy.plan = SeededPlan(0, rate=1.0, most=1, kinds=("lose",))
    assert not storage.create("commit/0", b"theirs")
    assert storage.read("commit/0") == b"ours"


OPERATIONS: dict[str, Callable[[ObjectStorage], object]] = {
    "read": lambda storage: storage.read("there"),
    "size": lambda storage: storage.size("there"),
    "open": lambda storage: storage.open("there"),
    "list": lambda storage: storage.list(""),
    "put": lambda storage: storage.put("new", b"data"),
    "create": lambda storage: storage.create("new", b"data"),
    "delete": lambda storage: storage.delete("there"),
    "move": lambda storage: storage.move_directory("there", "new"),
    "put_file": lambda storage: storage.put_file("new", Path(__file__)),
    "upload": lambda storage: storage.stage("d").open("new").write([bytes(40 * MIB)]),
}


def promised(storage: ObjectStorage) -> float:
    """Seconds after which a call has failed at the latest, whatever the server does: see ObjectStorage."""
    return storage.deadline + 3 * storage.request_timeout


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_dead_server_is_told_in_bounded_time(operation: str, connect: Connect, proxy: FlakyProxy) -> None:
    storage = connect(retries=1, deadline=3.2)
    storage.put("there", b"data")
    for kind in ("error", "drop"):
        proxy.plan = lambda request, kind=kind: kind  # type: ignore[misc]
        started = time.monotonic()
        with pytest.raises(StorageError, match=rf"^s3://{BUCKET}/.*(tried 3 times|the upload broke off)"):
            OPERATIONS[operation](storage)
        assert time.monotonic() - started < promised(storage)
    assert proxy.faults()["error"] >= 2


@pytest.mark.parametrize("kind", ["stall", "truncate"])
def test_reads_that_never_end_well_are_given_up(kind: str, connect: Connect, proxy: FlakyProxy) -> None:
    storage = connect(retries=1, request_timeout=0.2, deadline=4.4)
    storage.put("there", noise(1000))
    file = storage.open("there")
    proxy.plan = lambda request: kind if request.method == "GET" else None
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"could not read bytes 0 to 1000 of it: tried 3 times"):
        file.read_into(0, [memoryview(bytearray(1000))])
    assert time.monotonic() - started < promised(storage)
    assert proxy.faults()[kind] >= 3


def test_a_refusal_is_not_tried_again(connect: Connect, proxy: FlakyProxy) -> None:
    proxy.plan = lambda request: "deny"
    with pytest.raises(StorageError, match="tried 1 times"):
        connect().put("file", b"")
    assert len(proxy.log) == 1


def test_no_server_at_all(connect: Connect, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    storage = connect(retries=1, deadline=3.2)
    started = time.monotonic()
    with pytest.raises(StorageError, match="could not read it"):
        storage.read("file")
    assert time.monotonic() - started < promised(storage)


def test_objects_that_change_behind_a_reader(connect: Connect) -> None:
    storage = connect(retries=0)
    storage.put("file", bytes(100))
    file = storage.open("file")
    storage.put("file", bytes(50))
    for offset in (0, 60):
        with pytest.raises(ShardDamagedError, match=r"expected at least .* bytes, found 50"):
            file.read_into(offset, [memoryview(bytearray(100 - offset))])
    storage.delete("file")
    with pytest.raises(ShardDamagedError, match=r"file: expected 100 bytes, found no file any more; .* repair"):
        file.read_into(0, [memoryview(bytearray(100))])


def test_a_failed_part_aborts_the_upload(server: S3Server, connect: Connect, proxy: FlakyProxy) -> None:
    storage = connect(retries=1)
    proxy.plan = lambda request: "error" if "partNumber=2" in request.query else None
    stage = storage.stage("shards/00000")
    file = stage.open("file")
    with pytest.raises(StorageError, match=r"the upload broke off .*503"):
        file.write([bytes(80 * MIB)])
    for call in (lambda: file.write([bytes(40 * MIB)]), file.close, lambda: stage.publish(lambda: False)):
        with pytest.raises(StorageError, match="the upload broke off"):
            call()
    stage.abandon()
    assert not [name for name in server.open_uploads() if name.startswith(key(storage))]
    assert server.keys(key(storage)) == []


def test_abandon_aborts_open_uploads(server: S3Server, connect: Connect) -> None:
    storage = connect(request_timeout=10.0)
    stage = storage.stage("shards/00000")
    stage.open("file").write([bytes(25 * MIB)])
    deadline = time.monotonic() + 5
    while not (begun := [name for name in server.open_uploads() if name.startswith(key(storage))]):
        assert time.monotonic() < deadline
    stage.abandon()
    assert begun
    assert not [name for name in server.open_uploads() if name.startswith(key(storage))]


def test_a_program_that_dies_with_an_open_upload_ends(server: S3Server, connect: Connect, proxy: FlakyProxy) -> None:
    storage = connect()
    code = f"""
from draftcache.store.storage.object_store import ObjectStorage
file = ObjectStorage({storage.url!r}).stage("d").open("file")
file.write([bytes(25 << 20)])
raise SystemExit(3)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=20, check=False)
    assert result.returncode == 3
    assert [request for request in proxy.log if request.method == "POST"]
    assert not [name for name in server.open_uploads() if name.startswith(key(storage))]


# Processes


def _child(storage: ObjectStorage, depth: int, answers: Any) -> None:
    try:
        storage.put(f"child {depth}", storage.read("there") + storage.read("big")[:1])
        if depth:
            _in_child("fork", storage, depth - 1)
        answers.put("fine")
    except BaseException as exc:
        answers.put(repr(exc))
        raise


def _in_child(method: str, storage: ObjectStorage, depth: int) -> None:
    context: Any = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks of threaded processes
        process = context.Process(target=_child, args=(storage, depth, answers))
        process.start()
    process.join(15)
    alive = process.is_alive()
    process.kill()
    process.join()
    assert not alive, "the child hangs"
    assert answers.get() == "fine"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_use_an_inherited_storage(method: str, connect: Connect) -> None:
    """A child, and its own child, of a process that has used the store; the parent goes on using it."""
    storage = connect(request_timeout=10.0)
    storage.put("there", b"data")
    storage.put("big", bytes(10 * MIB))
    for _ in range(2 if method == "fork" else 1):
        _in_child(method, storage, 1)
        assert storage.read("child 1") == storage.read("child 0") == b"data\x00"
        assert storage.read("big") == bytes(10 * MIB)


def test_pickles_hold_no_client(connect: Connect) -> None:
    storage = connect()
    storage.put("file", b"data")
    copy = pickle.loads(pickle.dumps(storage))  # noqa: S301
    assert copy.read("file") == b"data"
    assert copy.url == storage.url


# Set-up


@pytest.mark.parametrize("url", ["s3://", "s3:///x", "http://bucket/x", "bucket/x", "gs:bucket"])
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(InputError, match="expected s3://bucket/prefix"):
        ObjectStorage(url)


def test_a_set_up_that_cannot_work_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(InputError, match=r"az://container/prefix: .*Account must be specified"):
        ObjectStorage("az://container/prefix").size("file")


def test_open_storage_finds_it(connect: Connect) -> None:
    assert isinstance(open_storage(connect().url), ObjectStorage)


def test_without_obstore_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(obstore_module, "_module", None)
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(InputError, match=r"pip install 'draftcache\[objects\]'"):
        ObjectStorage("s3://bucket/prefix")


def test_plans_are_reproducible() -> None:
    def draw() -> list[str | None]:
        plan = SeededPlan(5)
        return [
            plan(Request(method="GET", path=f"/{n % 99}", query="", range=None, conditional=False, started=0.0))
            for n in range(300)
        ]

    assert draw() == draw()
    assert set(draw()) == {None, *KINDS}
