"""How often an object store is asked, how often one answer is waited for before the next question, and for what bytes.

A proxy in front of a real S3 server counts. Each answer takes 30 ms, so that questions asked side by side overlap.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from draftcache.capture.job.progress import JobProgress
from draftcache.store.convert import Conversion
from draftcache.store.layouts.tar_shards import TarShard
from draftcache.store.reader import StoreReader
from draftcache.store.storage.asking import SIDE_BY_SIDE, ask_side_by_side
from draftcache.store.storage.base import open_storage
from draftcache.store.storage.local import LocalStorage
from draftcache.store.tar_stream import TarStream
from draftcache.store.verify import verify_store
from draftcache.store.writer import StoreWriter
from draftcache.tools.campaign.object_server import BUCKET, FlakyProxy, Request, S3Server, rounds
from draftcache.tools.reports.inspection import summarise
from support.remote_stores import connect, store_in_bucket, write_shards
from support.synthetic import manifest, write_files

FEW, MANY = 10, 60
STILL = 24
"""Rounds that an operation may take whatever the number of shards is."""
OVERLAP = SIDE_BY_SIDE // 4
"""Requests that a round answers at least: a busy machine does not get all 32 under way within 30 ms."""


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyProxy]:
    with FlakyProxy(server.address, slow=0.03) as running:
        connect(running, monkeypatch)
        yield running


class _Work:
    """What `JobProgress` needs to know of a job's plan."""

    def __init__(self, shards: int) -> None:
        self.shards = list(range(shards))

    def tokens(self, shards: Any) -> int:
        return len(list(shards))


def finish(url: str, shards: int) -> None:
    with StoreWriter(url, manifest(shards=shards, layout="webdataset"), write_files) as writer:
        assert len(writer.committed()) == shards
        assert writer.finish()


def end_of_capture(url: str, shards: int) -> None:
    work: Any = _Work(shards)
    assert JobProgress(work, open_storage(url)).summary().quarantined == []
    assert StoreReader(url).bytes_on_disk() > 0


def convert(url: str, target: str) -> None:
    """Start and end of a conversion whose shards all were written and compared by an earlier run."""
    summary = Conversion(url, target).run()
    assert (summary.finished, summary.shards, summary.checked) == (True, 0, 0)


OPERATIONS: dict[str, Callable[[str, int], object]] = {
    "open": lambda url, shards: StoreReader(url).close(),
    "open, unfinished": lambda url, shards: StoreReader(url, allow_partial=True).close(),
    "finish": finish,
    "resume": finish,
    "end of capture": end_of_capture,
    "inspect": lambda url, shards: summarise(url),
    "verify --quick": lambda url, shards: verify_store(url, quick=True, workers=1),
    "stream": lambda url, shards: TarStream(url),
    "convert": lambda url, shards: convert(url, f"{url}-copy"),
}


def counted(proxy: FlakyProxy, call: Callable[[], object]) -> list[Request]:
    """The requests of a call, each of which takes 30 ms."""
    proxy.log.clear()
    proxy.plan = lambda request: "slow"
    try:
        call()
    finally:
        proxy.plan = lambda request: None
    return list(proxy.log)


def test_no_operation_asks_shard_after_shard(server: S3Server, proxy: FlakyProxy, tmp_path: Path) -> None:
    """At 10 and at 60 shards: rounds do not grow with the shards but by the requests that go side by side."""
    logs: dict[tuple[str, int], list[Request]] = {}
    for shards in (FEW, MANY):
        url = store_in_bucket(server, tmp_path, shards=shards, layout="webdataset")
        name = url.rpartition("/")[2]
        Conversion(tmp_path / name, tmp_path / f"{name}-copy").run()
        server.load(tmp_path / f"{name}-copy", f"{name}-copy")
        for name, operation in OPERATIONS.items():
            if name in ("open, unfinished", "finish"):
                open_storage(url).delete("commit/index.json")
            logs[name, shards] = counted(proxy, partial(operation, url, shards))
            if name == "open, unfinished":
                finish(url, shards)
    for (name, shards), log in logs.items():
        assert rounds(log) <= STILL + len(log) / OVERLAP, (name, shards, len(log), rounds(log))
        assert len(log) <= STILL + 3 * shards, (name, shards, len(log))
    for name in OPERATIONS:
        more = rounds(logs[name, MANY]) - rounds(logs[name, FEW])
        assert more <= 3 * (MANY - FEW) / OVERLAP, (name, more)
    assert len(logs["open", MANY]) == len(logs["open", FEW]) <= 4
    assert len(logs["resume", MANY]) == len(logs["resume", FEW]) <= 10


def test_full_verify_asks_for_each_file_once(server: S3Server, proxy: FlakyProxy, tmp_path: Path) -> None:
    """Records and sizes cost no round per shard; a shard's files, which go side by side, at most two."""
    url = store_in_bucket(server, tmp_path, shards=MANY, layout="webdataset")
    log = counted(proxy, lambda: verify_store(url, workers=1))
    assert rounds(log) <= STILL + 2 * MANY
    assert len(log) <= STILL + 5 * MANY  # a record, three files, and index.npy again beside the store's


def test_one_after_the_other_would_be_noticed(proxy: FlakyProxy, tmp_path: Path, server: S3Server) -> None:
    """The negative control of the tests above: what was done before, a question per shard after the other."""
    url = store_in_bucket(server, tmp_path, shards=MANY, layout="webdataset")
    storage = open_storage(url)
    names = [f"commit/{shard:05d}.json" for shard in range(MANY)]
    serial = counted(proxy, lambda: [storage.read(name) for name in names])
    assert rounds(serial) > STILL + len(serial) / OVERLAP
    batch = counted(proxy, lambda: list(ask_side_by_side(storage, storage.read, names)))
    assert len(batch) == len(serial) == MANY
    assert rounds(batch) <= MANY / OVERLAP


def test_asking_side_by_side_keeps_order_and_first_error(tmp_path: Path, proxy: FlakyProxy) -> None:
    def ask(number: int) -> int:
        if number in (7, 9):
            raise ValueError(f"number {number}")
        return number

    for storage in (LocalStorage(tmp_path), open_storage(f"s3://{BUCKET}/nothing")):
        assert list(ask_side_by_side(storage, ask, range(5))) == [0, 1, 2, 3, 4]
        with pytest.raises(ValueError, match="number 7"):
            list(ask_side_by_side(storage, ask, range(1000)))


def test_answers_nobody_takes_are_not_asked_for(proxy: FlakyProxy) -> None:
    """Memory holds 128 answers at most, and a caller that has seen enough ends the questions."""
    asked = []

    def ask(number: int) -> int:
        asked.append(number)
        return number

    answers = ask_side_by_side(open_storage(f"s3://{BUCKET}/nothing"), ask, range(100_000))
    assert next(answers) == 0
    answers.close()  # type: ignore[attr-defined]
    assert len(asked) <= 4 * SIDE_BY_SIDE


# Bytes


def object_bytes(log: list[Request]) -> int:
    """Bytes of objects that were sent: bodies of GETs other than lists."""
    return sum(request.sent for request in log if request.method == "GET" and "list-type" not in request.query)


@pytest.mark.parametrize("layout", ["zarr", "webdataset"])
def test_verify_fetches_every_byte_once(server: S3Server, proxy: FlakyProxy, tmp_path: Path, layout: str) -> None:
    url = store_in_bucket(server, tmp_path, per_shard=40, shards=3, layout=layout)
    root = tmp_path / url.rpartition("/")[2]
    held = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    log = counted(proxy, lambda: verify_store(url))
    report = verify_store(url)
    assert (report.damages, report.strays, report.finished, report.conversations) == ([], [], True, 120)
    assert 0.99 * held < object_bytes(log) <= 1.05 * held
    assert object_bytes(counted(proxy, lambda: [verify_store(url) for _ in range(2)])) > 1.05 * held  # it can fail


@pytest.mark.parametrize("layout", ["zarr", "webdataset"])
def test_verify_leaves_no_copies(
    server: S3Server, proxy: FlakyProxy, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = store_in_bucket(server, tmp_path, shards=2, layout=layout)
    copies = tmp_path / "tmp"
    copies.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(copies))
    assert not verify_store(url).damages
    assert list(copies.iterdir()) == []


def ranges_of(log: list[Request]) -> list[tuple[int, int]]:
    found = [request.range.removeprefix("bytes=").split("-") for request in log if request.range]
    return sorted((int(low), int(high)) for low, high in found)


@pytest.mark.parametrize("window", [None, 3])
def test_a_windowed_read_of_a_tar_shard_fetches_no_byte_twice(
    server: S3Server, proxy: FlakyProxy, tmp_path: Path, window: int | None
) -> None:
    """Turns lie far apart, so that the rows in reach of the window are several groups in each member."""
    url = store_in_bucket(server, tmp_path, shards=2, layout="webdataset")
    reader, disk = StoreReader(url), StoreReader(tmp_path / url.rpartition("/")[2])
    names = ["token_ids", "loss_mask", "positions", "tap_1", "tap_3", "teacher_positions", "teacher_ids"]
    tokens = (2, 55)
    whole = reader.read(0)
    log = counted(proxy, lambda: reader.read(0, names, tokens=tokens, window=window))
    ranges = ranges_of(log)
    assert len(ranges) == len(names), [(request.range, request.path) for request in log]
    assert all(high < low for (_, high), (low, _) in itertools.pairwise(ranges)), ranges
    found, expected = (each.read(0, names, tokens=tokens, window=window) for each in (reader, disk))
    for name in names:
        assert found.arrays[name].tobytes() == expected.arrays[name].tobytes()
    kept = found.arrays["positions"]
    assert 0 < len(kept) < len(whole.arrays["positions"])
    rows = [list(whole.arrays["positions"]).index(position) for position in kept]
    assert found.arrays["tap_1"].tobytes() == whole.arrays["tap_1"][rows].tobytes()


def test_reading_members_by_their_parts_would_be_noticed(
    server: S3Server, proxy: FlakyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the test above: a shard that is taken for one whose rows can be read by themselves."""
    reader = StoreReader(store_in_bucket(server, tmp_path, shards=2, layout="webdataset"))
    monkeypatch.setattr(TarShard, "whole_arrays", False)
    monkeypatch.setattr(type(reader.specs["tap_1"]), "chunk_rows", 1)
    log = counted(proxy, lambda: reader.read(0, ["tap_1"], tokens=(2, 55), window=3))
    assert max(Counter(ranges_of(log)).values()) > 1


def test_a_store_on_a_disk_is_read_as_before(tmp_path: Path) -> None:
    write_shards(tmp_path / "s", manifest(shards=2, layout="webdataset"))
    storage = open_storage(tmp_path / "s")
    assert storage.pauses == ()
    sizes = storage.list_sizes("shards")
    assert [*sizes] == storage.list("shards")
    assert all(storage.size(name) == size for name, size in sizes.items())
    assert summarise(tmp_path / "s")["shards_committed"] == 2
