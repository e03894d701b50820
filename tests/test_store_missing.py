"""Conversations that a store should hold and does not: nothing reads the others without a word."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest

from draftcache.store.common.errors import InputError, ShardDamagedError, StoreError
from draftcache.store.convert import Conversion
from draftcache.store.format.commits import committed_shards
from draftcache.store.reader import StoreReader
from draftcache.store.storage.base import open_storage
from draftcache.store.tar_stream import TarStream
from draftcache.store.verify import verify_store
from draftcache.store.writer import StoreWriter
from draftcache.tools.campaign.object_server import BUCKET, CREDENTIALS, FlakyProxy, s3_server
from draftcache.tools.cli import main
from support.synthetic import items_of, manifest, write_files

EXTRA: dict[str, Any] = {"quarantined": [], "gates": {}}


def write(root: Path | str, layout: str = "webdataset", shards: int = 3) -> None:
    with StoreWriter(root, manifest(shards=shards, layout=layout), write_files) as writer:
        for shard in range(shards):
            writer.write_shard(shard, items_of(shard), EXTRA)
        writer.finish()


@pytest.mark.parametrize("shard", [0, 2])
def test_a_finished_store_without_one_commit_record(tmp_path: Path, shard: int) -> None:
    write(tmp_path / "s")
    (tmp_path / "s" / "commit" / f"{shard:05d}.json").unlink()
    expected = rf"s/commit: expected .* all 3 shards .* found none of \['0000{shard}'\], which hold 3 of its 9 conv"
    with pytest.raises(ShardDamagedError, match=expected):
        Conversion(tmp_path / "s", tmp_path / "copy", layout="zarr")
    with pytest.raises(ShardDamagedError, match=expected):
        TarStream(tmp_path / "s")
    with pytest.raises(ShardDamagedError, match=r"draftcache repair.*then the capture command"):
        StoreReader(tmp_path / "s").bytes_on_disk()
    assert main(["convert", str(tmp_path / "s"), str(tmp_path / "copy"), "--shard-tokens", "50"]) == 2
    assert main(["inspect", str(tmp_path / "s")]) == 2
    assert not (tmp_path / "copy").exists()


def test_a_record_of_fewer_conversations_than_the_index_has(tmp_path: Path) -> None:
    """The shard of another run of the same settings, in which a conversation was set aside."""
    write(tmp_path / "s")
    with StoreWriter(tmp_path / "other", manifest(shards=3, layout="webdataset"), write_files) as writer:
        writer.write_shard(1, items_of(1)[:2], EXTRA)
    for name in ("commit/00001.json", "shards/00001/data.tar", "shards/00001/index.npy", "shards/00001/members.npy"):
        (tmp_path / "s" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(ShardDamagedError, match=r"index.npy: expected 2 conversations of shard 00001.* found 3"):
        Conversion(tmp_path / "s", tmp_path / "copy")
    with pytest.raises(ShardDamagedError, match="expected 2 conversations"):
        TarStream(tmp_path / "s")
    assert main(["verify", str(tmp_path / "s")]) == 1


def test_a_bucket_that_answers_an_empty_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with s3_server() as server, FlakyProxy(server.address) as proxy:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": proxy.url, "AWS_ALLOW_HTTP": "true"}.items():
            monkeypatch.setenv(name, value)
        url = f"s3://{BUCKET}/{uuid.uuid4().hex}"
        write(url)
        proxy.plan = lambda request: "unlisted" if "list-type" in request.query else None
        assert committed_shards(open_storage(url)) == []
        assert len(list(StoreReader(url).records())) == 3
        assert sum(len(batch) for batch in TarStream(url)) == 9
        conversion = Conversion(url, tmp_path / "copy", layout="zarr")
        assert conversion.run().conversations == 9
        conversion.source.close()
        report = verify_store(url)
        assert (report.damages, report.finished, report.conversations) == ([], True, 9)
    assert verify_store(tmp_path / "copy").conversations == 9


def test_a_directory_that_can_not_be_listed_is_no_empty_one(tmp_path: Path) -> None:
    write(tmp_path / "s")
    for path in (tmp_path / "s" / "commit").iterdir():
        path.unlink()
    (tmp_path / "s" / "commit").rmdir()
    (tmp_path / "s" / "commit").symlink_to("commit")
    with pytest.raises(InputError, match=r"commit: expected the path .*symbolic links"):
        open_storage(tmp_path / "s").list("commit")


def test_an_unfinished_source_is_refused_and_inspect_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "s", "zarr")
    for name in ("index", "00001"):
        (tmp_path / "s" / "commit" / f"{name}.json").unlink()
    with pytest.raises(StoreError, match="expected a finished store of 3 shards, found 2"):
        Conversion(tmp_path / "s", tmp_path / "copy")
    assert main(["inspect", str(tmp_path / "s"), "--allow-partial", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["finished"] is False
    assert "warning" in err
    assert "2 of 3 shards are committed" in err
    assert main(["verify", str(tmp_path / "s"), "--allow-partial", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["finished"] is False
    assert main(["verify", str(tmp_path / "s")]) == 1


def test_a_copy_that_another_run_still_writes_is_not_called_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "s", "zarr")
    other = Conversion(tmp_path / "s", tmp_path / "copy", layout="webdataset")
    with StoreWriter(tmp_path / "copy", other.manifest, other._top_level_files) as writer:
        begun = writer.shard(1)
        assert begun is not None
        with begun:
            assert main(["convert", str(tmp_path / "s"), str(tmp_path / "copy"), "--layout", "webdataset"]) == 1
    assert "is not finished: expected 3 shards committed, the shards [1] are still missing" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "s"), str(tmp_path / "copy"), "--layout", "webdataset"]) == 0
    assert verify_store(tmp_path / "copy").finished
