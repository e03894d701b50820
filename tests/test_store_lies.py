"""Answers of an object store that are whole and not true: no such object, half of it, another content, half a list.

A lie that is told once or twice does no harm; one that is always told is damage, which is named and ends the command.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from draftcache.store.common.errors import ShardDamagedError, StoreError, StoreNotFoundError
from draftcache.store.common.sealed_json import seal, unseal
from draftcache.store.format.index import write_store_index
from draftcache.store.local_copies import CopyError, copy_file
from draftcache.store.reader import StoreReader
from draftcache.store.storage import asking
from draftcache.store.storage.base import Storage, open_storage
from draftcache.store.storage.local import LocalStorage
from draftcache.store.tar_stream import TarStream
from draftcache.store.verify import verify_store
from draftcache.store.writer import StoreWriter
from draftcache.tools.campaign.fault_plans import LyingPlan
from draftcache.tools.campaign.object_server import BUCKET, LIES, FlakyProxy, S3Server
from draftcache.tools.cli import main
from draftcache.tools.reports.inspection import summarise
from support.remote_stores import EXTRA, connect, store_in_bucket
from support.synthetic import items_of, manifest, write_files

SHARDS = 3
ALWAYS = math.inf
LAYOUTS = ["zarr", "webdataset"]
WRONG = [kind for kind in LIES if kind != "shortlist"]
"""Lies about an object."""


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyProxy]:
    with FlakyProxy(server.address) as running:
        connect(running, monkeypatch, backoff=0.002)
        yield running


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses before something was asked for again."""
    pauses: list[float] = []
    monkeypatch.setattr(asking.time, "sleep", pauses.append)
    return pauses


def made(server: S3Server, scratch: Path, layout: str) -> str:
    return store_in_bucket(server, scratch, shards=SHARDS, layout=layout, per_shard=2)


def disk_of(url: str, scratch: Path) -> Path:
    return scratch / url.rpartition("/")[2]


def require_equal(url: str, disk: Path) -> None:
    """Every array, record and top-level file that a reader gives is the one on the disk."""
    ours, theirs = StoreReader(url), StoreReader(disk)
    assert len(ours) == len(theirs) == 2 * SHARDS
    assert list(ours.records()) == list(theirs.records())
    for number in range(len(theirs)):
        found, expected = ours.read(number).arrays, theirs.read(number).arrays
        assert {name: values.tobytes() for name, values in found.items()} == {
            name: values.tobytes() for name, values in expected.items()
        }
    assert ours.files.frozen.read_bytes() == theirs.files.frozen.read_bytes()
    assert ours.vocab_map().hash == theirs.vocab_map().hash
    ours.close()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", LIES)
def test_a_lie_or_two_do_no_harm(
    server: S3Server, proxy: FlakyProxy, tmp_path: Path, kind: str, times: int, layout: str
) -> None:
    """Every object and list is lied about: while the store is read, streamed, inspected and verified."""
    url = made(server, tmp_path, layout)

    def lied_to(what: str, least: int) -> None:
        told = proxy.faults()[kind]
        assert told >= (1 if kind == "shortlist" else least), (what, told)
        proxy.log.clear()
        proxy.plan = LyingPlan(kind, times)

    proxy.plan = LyingPlan(kind, times)
    require_equal(url, disk_of(url, tmp_path))
    if kind != "shortlist":  # a finished store is read without any list
        lied_to("read", 20 * times)
    if layout == "webdataset":
        assert sum(len(batch) for batch in TarStream(url)) == 2 * SHARDS
    assert summarise(url)["shards_committed"] == SHARDS
    proxy.log.clear()
    for quick in (True, False):
        proxy.plan = LyingPlan(kind, times)
        report = verify_store(url, quick=quick)
        assert (report.damages, report.finished, report.conversations) == ([], True, 2 * SHARDS)
        lied_to("verify", 8 * times)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", WRONG)
def test_a_file_that_is_always_wrong_is_damage(
    server: S3Server,
    proxy: FlakyProxy,
    tmp_path: Path,
    kind: str,
    layout: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    url = made(server, tmp_path, layout)
    name = "tap_1/c.0.0" if layout == "zarr" else "data.tar"
    proxy.plan = LyingPlan(kind, ALWAYS, path=f"shards/00001/{name}")
    started = time.monotonic()
    assert main(["verify", url, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["damaged_shards"] == [1]
    assert report["conversations"] == 2 * SHARDS
    (damage,) = [item for item in report["damages"] if item["name"].endswith(name)]
    assert {item["dataset_index"] for item in damage["conversations"]} == {2, 3}
    problem = damage["problem"]
    assert f"{url}/shards/00001/{name}: expected" in problem
    assert ("found" in problem) or ("held" in problem)
    assert "run `draftcache repair`" in problem
    reader = StoreReader(url)
    reader.read(0)
    with pytest.raises(ShardDamagedError, match=rf"{url}/shards/00001/{name}.*draftcache repair"):
        reader.read(2)
    if layout == "webdataset":
        with pytest.raises(ShardDamagedError, match=r"shards/00001/data\.tar"):
            list(TarStream(url))
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("name", ["commit/00001.json", "commit/frozen.json", "commit/index.json", "index.npy"])
def test_a_record_that_is_always_wrong_is_damage(
    server: S3Server, proxy: FlakyProxy, tmp_path: Path, kind: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    url = made(server, tmp_path, "webdataset")
    proxy.plan = LyingPlan(kind, ALWAYS, path=rf"{url.rpartition('/')[2]}/{name}")
    quick_finds = name != "index.npy" or kind != "stale"  # content is what --quick does not look at
    assert main(["verify", url, "--quick", "--json"]) == int(quick_finds)
    if quick_finds:
        assert "expected" in json.loads(capsys.readouterr().out)["damages"][0]["problem"]
    assert main(["verify", url]) == 1
    assert "DAMAGED" in capsys.readouterr().out
    if "index" in name:
        with pytest.raises(StoreError, match=name):
            StoreReader(url)
    if name == "commit/00001.json":
        with pytest.raises(StoreError, match=r"found none|hash to|expected JSON"):
            StoreReader(url).read(2)


@pytest.mark.parametrize("kind", ["short", "stale"])
def test_a_manifest_that_is_always_wrong_is_damage(
    server: S3Server, proxy: FlakyProxy, tmp_path: Path, kind: str
) -> None:
    url = made(server, tmp_path, "webdataset")
    proxy.plan = LyingPlan(kind, ALWAYS, path="manifest.json")
    assert [damage.name for damage in verify_store(url).damages] == ["manifest.json"]
    with pytest.raises(StoreError, match=r"manifest\.json: expected"):
        StoreReader(url)


def test_lists_that_are_always_short_lose_nothing(
    server: S3Server, proxy: FlakyProxy, tmp_path: Path, slept: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """What a list leaves out is asked for by name, and the objects themselves are there."""
    url = made(server, tmp_path, "zarr")
    proxy.plan = LyingPlan("shortlist", ALWAYS)
    for flag in ([], ["--quick"]):
        assert main(["verify", url, *flag]) == 0
    assert proxy.faults()["shortlist"] >= 2
    assert summarise(url)["shards_committed"] == SHARDS
    open_storage(url).delete("commit/index.json")
    assert write_store_index(open_storage(url), StoreReader(disk_of(url, tmp_path)).manifest)
    assert verify_store(url).finished
    assert slept == []  # the first answer by name is the right one
    open_storage(url).delete("commit/00002.json")  # and what is really gone is told
    assert main(["verify", url, "--quick"]) == 1
    assert "commit/00002.json" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["shards/00001/data.tar", "frozen.safetensors"])
@pytest.mark.parametrize(("fault", "code"), [("truncate", 1), ("error", 3), ("deny", 3)])
def test_a_bucket_that_does_not_answer_is_not_called_damaged(
    server: S3Server,
    proxy: FlakyProxy,
    tmp_path: Path,
    fault: str,
    code: int,
    name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Otherwise repair would take a whole store apart after a bad hour.

    An object whose bytes never come, though the bucket knows it, is damaged.
    """
    url = made(server, tmp_path, "webdataset")
    proxy.plan = lambda request: fault if name in request.path else None
    assert main(["verify", url]) == code
    out, err = capsys.readouterr()
    assert f"{name}: could not" in (out if code == 1 else err)
    assert ("DAMAGED" in out) == (code == 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_several_processes_verify_a_bucket(server: S3Server, proxy: FlakyProxy, tmp_path: Path, layout: str) -> None:
    url = store_in_bucket(server, tmp_path, shards=8, layout=layout)
    open_storage(url).put("shards/00005/index.npy", b"not an index")
    open_storage(url).delete("commit/00006.json")
    done: list[int] = []
    report = verify_store(url, workers=2, progress=done.append)
    assert report.damaged_shards == [5, 6]
    assert (report.committed, report.conversations, len(done)) == (7, 7, 7)


def test_a_disk_without_room_for_copies_is_not_damage(
    server: S3Server, proxy: FlakyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = made(server, tmp_path, "webdataset")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CopyError, match=r"file/x: could not write a copy of .*data\.tar .* TMPDIR"):
        copy_file(open_storage(url), "shards/00000/data.tar", 10, tmp_path / "file" / "x")

    def full(storage: Storage, name: str, size: int, path: Path) -> str:
        raise CopyError(f"{path}: could not write")

    monkeypatch.setattr("draftcache.store.local_copies.copy_file", full)
    assert main(["verify", url]) == 3
    assert main(["verify", url, "--quick"]) == 0


# A record of a moment ago


def with_former_record(server: S3Server, proxy: FlakyProxy, url: str, layout: str) -> str:
    """Have stale answers hold an earlier record of shard 1, whose files are gone. Returns the record's path."""
    path = f"/{BUCKET}/{url.rpartition('/')[2]}/commit/00001.json"
    record = unseal(open_storage(url).read("commit/00001.json"), "record")
    text = json.dumps(record).replace("shards/00001/", "shards/00001-0badcafe/")
    proxy.former[path] = seal(json.loads(text) | {"directory": "shards/00001-0badcafe"})
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_earlier_record_is_read_again(server: S3Server, proxy: FlakyProxy, tmp_path: Path, layout: str) -> None:
    """It is sealed, of this shard and this store. Only its files tell that it is out of date."""
    url = made(server, tmp_path, layout)
    path = with_former_record(server, proxy, url, layout)
    for times in (1, 2):
        reader = StoreReader(url)
        proxy.plan = LyingPlan("stale", times, path=path)
        expected = StoreReader(disk_of(url, tmp_path)).read(3).arrays["tap_3"]
        assert reader.read(3).arrays["tap_3"].tobytes() == expected.tobytes()
        assert proxy.faults()["stale"] == times
        for quick in (True, False):
            proxy.log.clear()
            proxy.plan = LyingPlan("stale", times, path=path)
            report = verify_store(url, quick=quick)
            assert (report.damages, report.strays, report.finished) == ([], [], True)
            assert proxy.faults()["stale"] == times
        proxy.log.clear()
    proxy.plan = LyingPlan("stale", ALWAYS, path=path)
    assert verify_store(url, quick=True).damaged_shards == [1]
    assert verify_store(url).damaged_shards == [1]
    with pytest.raises(ShardDamagedError, match="shards/00001-0badcafe"):
        StoreReader(url).read(3)


def require_files(url: str) -> None:
    reader = StoreReader(url)
    try:
        assert reader.files.frozen.is_file()
    finally:
        reader.close()


@pytest.mark.parametrize("name", ["frozen", "index"])
def test_an_earlier_record_of_a_top_level_file_is_read_again(
    server: S3Server, proxy: FlakyProxy, tmp_path: Path, name: str
) -> None:
    url = made(server, tmp_path, "webdataset")
    path = f"/{BUCKET}/{url.rpartition('/')[2]}/commit/{name}.json"
    record = unseal(open_storage(url).read(f"commit/{name}.json"), "record")
    (entry,) = record["files"].values()
    entry["xxh3_128"] = "0" * 32
    proxy.former[path] = seal(record)
    for times in (1, 2):
        proxy.plan = LyingPlan("stale", times, path=path)
        require_equal(url, disk_of(url, tmp_path))
        proxy.plan = LyingPlan("stale", times, path=path)
        assert verify_store(url).damages == []
    proxy.plan = LyingPlan("stale", ALWAYS, path=path)
    assert {damage.name.partition(".")[0] for damage in verify_store(url).damages} == {name}
    with pytest.raises(ShardDamagedError, match=r"expected xxh3-128 0{32}, found"):
        require_files(url)


# What may well be missing


def test_what_may_be_missing_is_asked_for_once(proxy: FlakyProxy, slept: list[float], tmp_path: Path) -> None:
    """No pause and few requests: where there is no store, and while one is written."""
    url = f"s3://{BUCKET}/nobody"
    with pytest.raises(StoreNotFoundError, match="expected a draftcache store"):
        StoreReader(url)
    assert len(proxy.log) <= 3
    with StoreWriter(url, manifest(shards=2, layout="webdataset"), write_files) as writer:
        for shard in range(2):
            assert not writer.finish()
            writer.write_shard(shard, items_of(shard, 1), EXTRA)
            assert StoreReader(url, allow_partial=True).finished is False
        assert writer.finish()
    assert verify_store(url).damages == []
    assert slept == []


def test_a_store_without_its_manifest_is_looked_for_again(
    server: S3Server, proxy: FlakyProxy, slept: list[float], tmp_path: Path
) -> None:
    """The negative control of the test above: commit records say that there must be a manifest."""
    url = made(server, tmp_path, "webdataset")
    open_storage(url).delete("manifest.json")
    with pytest.raises(StoreNotFoundError, match="expected a draftcache store"):
        StoreReader(url)
    assert slept == list(open_storage(url).pauses)


def test_a_resumed_capture_does_not_take_a_store_for_foreign_files(
    server: S3Server, proxy: FlakyProxy, tmp_path: Path
) -> None:
    """A manifest that is not seen at first, though shards are: its writer neither refuses nor begins anew."""
    url = made(server, tmp_path, "webdataset")

    def never(directory: Path) -> list[Path]:
        raise AssertionError("the top-level files are there")

    proxy.plan = LyingPlan("absent", 2)
    with StoreWriter(url, manifest(shards=SHARDS, layout="webdataset"), never) as writer:
        assert writer.committed() == set(range(SHARDS))
        assert writer.finish()
    assert proxy.faults()["absent"] >= 4


def test_asking_again_ends(slept: list[float], tmp_path: Path, proxy: FlakyProxy) -> None:
    """Three looks in an object store, one on a disk; errors that a look can't mend end it at once."""
    remote = open_storage(f"s3://{BUCKET}/nothing")
    looks: list[Any] = []

    def missing() -> None:
        looks.append(1)
        raise ShardDamagedError("gone")

    for storage, expected in ((remote, 3), (LocalStorage(tmp_path), 1)):
        looks.clear()
        with pytest.raises(ShardDamagedError, match="gone"):
            asking.ask_again(storage, missing)
        assert len(looks) == expected
    assert slept == list(remote.pauses)

    def refused() -> None:
        looks.append(1)
        raise asking.StorageError("no permission")

    looks.clear()
    with pytest.raises(asking.StorageError):
        asking.ask_again(remote, refused)
    assert len(looks) == 1
