"""A whole store in a bucket: written by several, read, verified, repaired and converted, over a failing network too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draftcache.store.common.errors import InputError, ShardDamagedError, StorageError
from draftcache.store.convert import Conversion
from draftcache.store.reader import StoreReader
from draftcache.store.repair import repair_store
from draftcache.store.storage.base import open_storage
from draftcache.store.storage.object_store import ObjectStorage
from draftcache.store.verify import verify_store
from draftcache.store.writer import StoreWriter
from draftcache.tools.campaign.fault_plans import SeededPlan
from draftcache.tools.campaign.object_server import BUCKET, CREDENTIALS, FlakyProxy, S3Server
from draftcache.tools.cli import main
from support.synthetic import conversation, manifest, turns, write_files

SHARDS = 3
EXTRA: dict[str, Any] = {"quarantined": [], "gates": {}}


@pytest.fixture
def proxy(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyProxy]:
    with FlakyProxy(server.address, stall=0.9) as running:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": running.url, "AWS_ALLOW_HTTP": "true"}.items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.fixture
def url(proxy: FlakyProxy) -> str:
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


def items(shard: int, mode: str = "lossless") -> list[Any]:
    rng = np.random.default_rng(shard)
    return [conversation(rng, turns(40, (6, 16), (22, 37)), number=4 * shard + k, mode=mode) for k in range(4)]


def write(location: Any, layout: str = "zarr") -> None:
    made = manifest(shards=SHARDS, mode="lossless", layout=layout)
    with StoreWriter(location, made, write_files) as writer:
        for shard in range(SHARDS):
            if shard not in writer.committed():
                writer.write_shard(shard, items(shard), EXTRA)
        assert writer.finish()


def require_whole(location: Any) -> None:
    reader = StoreReader(location)
    assert len(reader) == 4 * SHARDS
    for shard in range(SHARDS):
        for k, expected in enumerate(items(shard)):
            found = reader.read(4 * shard + k)
            for name, values in expected.arrays.items():
                np.testing.assert_array_equal(found.arrays[name], values)
    assert reader.vocab_map().hash == reader.manifest.draft_vocab_hash
    reader.close()


@pytest.mark.parametrize("layout", ["zarr", "webdataset"])
def test_the_bucket_holds_the_files_that_a_disk_would(server: S3Server, url: str, tmp_path: Path, layout: str) -> None:
    write(url, layout)
    write(tmp_path / "disk", layout)
    require_whole(url)
    report = verify_store(url)
    assert report.finished
    assert (report.damages, report.strays, report.committed) == ([], [], SHARDS)
    for ours, disk in zip(StoreReader(url).records(), StoreReader(tmp_path / "disk").records(), strict=True):
        hashes = [[item["xxh3_128"] for item in record["files"].values()] for record in (ours, disk)]
        assert hashes[0] == hashes[1]


def test_of_two_writers_of_one_shard_one_is_told_that_it_lost(server: S3Server, url: str) -> None:
    made = manifest(shards=SHARDS, mode="lossless")
    with StoreWriter(url, made, write_files) as one, StoreWriter(url, made, write_files) as two:
        first, second = one.shard(0), two.shard(0)
        assert first is not None
        assert second is not None  # machines that share a bucket share no lock
        with first, second:
            for begun in (first, second):
                for item in items(0):
                    begun.append(item)
            assert first.commit(EXTRA | {"provenance": "one"})
            assert not second.commit(EXTRA | {"provenance": "two"})
        assert two.shard(0) is None
        for shard in (1, 2):
            two.write_shard(shard, items(shard), EXTRA)
        assert one.finish()
    require_whole(url)
    report = verify_store(url)
    assert (report.damages, report.strays) == ([], [])  # what the loser had sent is gone
    assert next(StoreReader(url).records())["provenance"] == "one"


def test_a_commit_whose_answer_never_came_keeps_the_files(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record was written: what it names must not be deleted."""
    made = manifest(shards=1, mode="lossless")
    original = ObjectStorage.create

    def breaking(self: ObjectStorage, name: str, data: bytes) -> bool:
        original(self, name, data)
        raise StorageError("the connection broke after the server had done it")

    with StoreWriter(url, made, write_files) as writer:
        begun = writer.shard(0)
        assert begun is not None
        with begun:
            for item in items(0):
                begun.append(item)
            with monkeypatch.context() as patch:
                patch.setattr(ObjectStorage, "create", breaking)
                with pytest.raises(StorageError):
                    begun.commit(EXTRA)
        assert writer.committed() == {0}
        assert writer.finish()
    assert len(StoreReader(url)) == 4
    assert not verify_store(url).damages


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_a_failing_network_does_no_harm(
    proxy: FlakyProxy, url: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = {"retries": 4, "backoff": 0.01, "request_timeout": 0.6, "deadline": 20.0}
    monkeypatch.setattr(ObjectStorage.__init__, "__kwdefaults__", ObjectStorage.__init__.__kwdefaults__ | quick)
    proxy.plan = SeededPlan(seed, rate=0.3, most=2)
    write(url)
    assert sum(proxy.faults().values()) > 20
    require_whole(url)
    proxy.plan = lambda request: None
    assert not verify_store(url).damages


def test_damage_is_named_repaired_and_made_again(
    server: S3Server, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(url)
    record = list(StoreReader(url).records())[1]
    name = next(name for name in record["files"] if "tap_3_hi" in name and "/c." in name)
    key = open_storage(url).describe(name).removeprefix(f"s3://{BUCKET}/")
    data = bytearray(server.client.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    data[20] ^= 4
    server.client.put_object(Bucket=BUCKET, Key=key, Body=bytes(data))
    with pytest.raises(ShardDamagedError, match="tap_3_hi"):
        [StoreReader(url).read(number) for number in range(12)]
    StoreReader(url).read(0)
    assert main(["verify", url, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["damaged_shards"] == [1]
    assert {item["dataset_index"] for damage in report["damages"] for item in damage["conversations"]} <= set(
        range(4, 8)
    )
    assert repair_store(url, verify_store(url)).shards == [1]
    write(url)  # makes just that one again
    require_whole(url)
    assert main(["verify", url]) == 0


def test_a_verification_of_a_bucket_goes_on_from_its_journal(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The notes are a local file, as nothing is appended in a bucket."""
    write(url)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("draftcache.store.verify._strays", interrupt)
        with pytest.raises(KeyboardInterrupt):
            verify_store(url, journal=tmp_path / "notes")
    with pytest.raises(InputError, match="quick: expected True, found False"):
        verify_store(url, journal=tmp_path / "notes", quick=True)
    report = verify_store(url, journal=tmp_path / "notes")
    assert (report.from_journal, report.complete, report.damages) == (report.committed, True, [])
    report = verify_store(url, sample=0.1, journal=tmp_path / "notes")
    assert (report.from_journal, report.read_in_full, report.checked_by_size) == (0, 1, report.committed - 1)


def test_the_command_line_works_on_a_bucket(proxy: FlakyProxy, url: str, tmp_path: Path) -> None:
    """In processes of their own, as users run them: convert to the bucket, look at it, verify, convert back."""
    write(tmp_path / "disk")

    def run(*arguments: str) -> str:
        command = [sys.executable, "-m", "draftcache.tools.cli", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ)).stdout

    run("convert", str(tmp_path / "disk"), url, "--layout", "webdataset")
    assert json.loads(run("inspect", url, "--json"))["conversations"] == 12
    run("verify", url, "--workers", "2")
    run("convert", url, str(tmp_path / "back"), "--layout", "zarr")
    require_whole(tmp_path / "back")


def test_converting_to_a_bucket_goes_on_where_it_was_cut(url: str, tmp_path: Path) -> None:
    write(tmp_path / "disk")
    Conversion(tmp_path / "disk", url).run()
    storage = open_storage(url)
    storage.delete("commit/00001.json")
    storage.delete("commit/index.json")
    assert Conversion(tmp_path / "disk", url).run().shards == 1
    require_whole(url)
