"""Writing, committing and reading shards; every guard seen firing on real files."""

from __future__ import annotations

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from awscrt.checksums import crc32c
from numcodecs import Zstd

from draftcache.store.common.errors import (
    InputError,
    ManifestMismatchError,
    ShardDamagedError,
    StoreError,
    StoreNotFoundError,
    StoreVersionError,
)
from draftcache.store.common.sealed_json import seal
from draftcache.store.format.manifest import VERSION, StoreManifest
from draftcache.store.layouts import tar_shards, zarr_writer
from draftcache.store.reader import StoreReader
from draftcache.store.storage.base import open_storage
from draftcache.store.writer import StoreWriter
from support.synthetic import conversation, manifest, turns, write_files, write_store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    write_store(tmp_path / "store")
    return tmp_path / "store"


def test_round_trip_is_exact(store: Path) -> None:
    rng = np.random.default_rng(0)
    reader = StoreReader(store)
    assert len(reader) == 8
    for shard, split in enumerate(("train", "val")):
        for number, member in enumerate(reader.members(split)):
            expected = conversation(rng, turns(40, (6, 16), (22, 37)), number=number, split=shard)
            found = reader.read(int(member))
            assert (found.content_hash, found.split, found.dataset_index) == (expected.content_hash, shard, number)
            for name, values in expected.arrays.items():
                np.testing.assert_array_equal(found.arrays[name], values)
                assert found.arrays[name].dtype == values.dtype


def test_only_asked_arrays_are_read(store: Path) -> None:
    assert set(StoreReader(store).read(0, ["token_ids"]).arrays) == {"token_ids"}


def test_plain_zarr_reads_the_shards(store: Path) -> None:
    group = zarr.open_group(store / "shards" / "00000", mode="r")
    array = group["tap_1"]
    assert isinstance(array, zarr.Array)
    assert array.chunks == (2048, 8)  # rows of 32 bytes: 64 KiB
    expected = np.concatenate([StoreReader(store).read(number).arrays["tap_1"] for number in range(4)])
    np.testing.assert_array_equal(np.asarray(array[...]), expected)
    codecs = json.loads((store / "shards" / "00000" / "tap_1" / "zarr.json").read_text())["codecs"]
    assert codecs[0]["name"] == "sharding_indexed"
    assert codecs[0]["configuration"]["codecs"][-1]["name"] == "crc32c"


def test_all_zero_chunks_are_written(tmp_path: Path) -> None:
    """A chunk of zeros that is left out could not be told from a chunk that was lost."""
    write_store(tmp_path / "s", splits=("train", "val"))
    size = (tmp_path / "s" / "shards" / "00000" / "tap_1" / "c.0.0").stat().st_size
    assert size >= 2048 * 8 * 4


@pytest.mark.parametrize("layout", ["zarr", "webdataset"])
def test_conversations_that_are_written_side_by_side_give_the_same_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """Two shards at once, whose chunks begin and end anywhere in a conversation."""
    lengths = (3000, 40, 2100, 700, 5000)

    def write(name: str, at_once: int) -> dict[str, bytes]:
        made = manifest(mode="lossless", layout=layout)
        with StoreWriter(tmp_path / name, made, write_files) as writer:

            def shard(number: int) -> None:
                rng = np.random.default_rng(number)
                items = [
                    conversation(rng, turns(n, (9, n - 3)), window=made.window, number=k, split=number, mode=made.mode)
                    for k, n in enumerate(lengths)
                ]
                writer.write_shard(number, items, {"quarantined": [], "gates": {}})

            with ThreadPoolExecutor(at_once) as pool:
                list(pool.map(shard, range(made.shards)))
            writer.finish()
        root = tmp_path / name / "shards"
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    threads: set[str] = set()
    encode = Zstd.encode

    def spying(self: Zstd, data: object) -> bytes:
        threads.add(threading.current_thread().name)
        return encode(self, data)  # type: ignore[no-any-return]

    module = {"zarr": zarr_writer, "webdataset": tar_shards}[layout]
    monkeypatch.setattr(module, "_ZSTD", type("Spy", (Zstd,), {"encode": spying})(level=1))
    alone = write("alone", 1)
    assert not all(name.startswith("draftcache-arrays") for name in threads)
    threads.clear()
    monkeypatch.setattr(module, "PARALLEL_BYTES", 0)
    assert write("together", 2) == alone
    assert len(threads) > 1
    assert all(name.startswith("draftcache-arrays") for name in threads)


def test_flipped_payload_byte_is_detected_on_read(store: Path) -> None:
    path = store / "shards" / "00000" / "tap_3" / "c.0.0"
    data = bytearray(path.read_bytes())
    data[100] ^= 0x10
    path.write_bytes(data)
    reader = StoreReader(store)
    reader.read(0, ["tap_1"])
    with pytest.raises(ShardDamagedError, match="tap_3"):
        reader.read(0, ["tap_3"])


def test_every_flipped_data_byte_is_detected_on_read(store: Path) -> None:
    rng = np.random.default_rng(0)
    files = sorted((store / "shards").glob("*/*/c.*"))
    files = [path for path in files if path.is_file()]
    assert len(files) == 2 * 14
    for _ in range(300):
        path = files[rng.integers(len(files))]
        original = path.read_bytes()
        damaged = bytearray(original)
        damaged[rng.integers(len(damaged))] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        reader = StoreReader(store)
        with pytest.raises(ShardDamagedError):
            _ = [reader.read(number) for number in range(len(reader))]
        path.write_bytes(original)


def test_chunk_that_was_never_written_is_an_error(store: Path) -> None:
    """What zarr reads as zeros: an index entry of 2**64 - 1, under a valid checksum."""
    path = store / "shards" / "00000" / "tap_1" / "c.0.0"
    data = bytearray(path.read_bytes())
    data[-20:-4] = b"\xff" * 16
    data[-4:] = crc32c(bytes(data[-20:-4])).to_bytes(4, "little")
    path.write_bytes(data)
    group = zarr.open_group(store / "shards" / "00000", mode="r")
    assert not np.asarray(group["tap_1"][...]).any()  # type: ignore[index, arg-type]
    with pytest.raises(ShardDamagedError, match="inside the file"):
        StoreReader(store).read(0)


def test_missing_file_is_an_error_and_never_zeros(store: Path) -> None:
    (store / "shards" / "00001" / "tap_1" / "c.0.0").unlink()
    reader = StoreReader(store)
    reader.read(0)
    with pytest.raises(ShardDamagedError, match="found no file"):
        reader.read(int(reader.members("val")[0]))


def test_truncated_file_is_detected_by_size(store: Path) -> None:
    path = store / "shards" / "00000" / "token_ids" / "c.0"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ShardDamagedError, match="token_ids"):
        StoreReader(store).read(0)


def test_uncommitted_shards_are_invisible_and_redone(tmp_path: Path) -> None:
    root = tmp_path / "store"
    write_store(root)
    (root / "commit" / "00001.json").unlink()
    (root / "commit" / "index.json").unlink()
    former = root / "shards" / ".00001.partial"  # a former version's name, which tells no owner
    former.mkdir()
    os.utime(former, (0, 0))
    with pytest.raises(StoreError, match="found 1 committed"):
        StoreReader(root)
    assert len(StoreReader(root, allow_partial=True)) == 4
    with StoreWriter(root, manifest(), write_files) as writer:
        assert writer.committed() == {0}
        items = [conversation(np.random.default_rng(1), turns(30, (4, 20)), split=1)]
        writer.write_shard(1, items, {"quarantined": [], "gates": {}})
        writer.finish()
    assert len(StoreReader(root)) == 5
    assert not list((root / "shards").glob(".*"))


def test_other_settings_are_refused_by_name(store: Path) -> None:
    with pytest.raises(ManifestMismatchError, match=r"top_k: store has 6, this job has 5"):
        StoreWriter(store, manifest(top_k=5), write_files)
    StoreWriter(store, manifest(), write_files).__exit__(None, None, None)  # the refusal let go of the lock


def test_provenance_may_differ(store: Path) -> None:
    with StoreWriter(store, manifest(provenance={"torch": "another"}), write_files) as writer:
        assert writer.committed() == {0, 1}


def test_writers_share_a_store_but_no_shard(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, manifest(), write_files) as one, StoreWriter(tmp_path, manifest(), write_files) as two:
        begun = one.shard(0)
        assert begun is not None
        with begun:
            assert two.shard(0) is None
            assert two.shard(1) is not None
            begun.append(conversation(np.random.default_rng(1), turns(30, (4, 20))))
            assert begun.commit({"quarantined": [], "gates": {}})
        assert two.shard(0) is None
        assert not two.finish()


def test_a_writer_that_asks_to_be_alone_is_or_is_refused(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("draftcache.store.writer.CLEANING_S", 0.2)
    with (
        StoreWriter(store, manifest(), write_files, exclusive=True),
        pytest.raises(StoreError, match="another job"),
    ):
        StoreWriter(store, manifest(), write_files)
    with StoreWriter(store, manifest(), write_files), pytest.raises(StoreError, match="another job"):
        StoreWriter(store, manifest(), write_files, exclusive=True)


def test_what_is_not_committed_is_removed(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, manifest(), write_files) as writer:
        begun = writer.shard(0)
        assert begun is not None
        with begun:
            begun.append(conversation(np.random.default_rng(1), turns(30, (4, 20))))
        assert writer.committed() == set()
        assert not list((tmp_path / "shards").iterdir())


def test_newer_foreign_edited_and_missing_manifests(store: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError):
        StoreReader(tmp_path)
    zarr.create_group(tmp_path / "foreign.zarr", zarr_format=3)
    with pytest.raises(StoreNotFoundError, match="zarr group of another program"):
        StoreReader(tmp_path / "foreign.zarr")
    path = store / "manifest.json"
    body = json.loads(path.read_text())
    path.write_text(json.dumps(body | {"version": VERSION + 1}))
    with pytest.raises(StoreVersionError, match=f"found {VERSION + 1}; upgrade"):
        StoreReader(store)
    path.write_text(json.dumps(body | {"version": 1}))
    with pytest.raises(StoreVersionError, match="found 1; capture it again"):
        StoreReader(store)
    path.write_text(json.dumps({"zarr_format": 3, "node_type": "group"}))
    with pytest.raises(StoreError, match="another program"):
        StoreReader(store)
    path.write_text(json.dumps(body | {"top_k": 7}))
    with pytest.raises(StoreError, match="edited or damaged"):
        StoreReader(store)
    content = {key: value for key, value in body.items() if key not in ("window", "xxh3_128")}
    path.write_bytes(seal(content))
    with pytest.raises(StoreError, match="window"):
        StoreReader(store)


def test_shard_of_another_store_is_refused(store: Path, tmp_path: Path) -> None:
    write_store(tmp_path / "other", top_k=6, shard_tokens=50, seed=1)
    for relative in ("shards/00000", "commit/00000.json"):
        source, target = tmp_path / "other" / relative, store / relative
        shutil.rmtree(target) if target.is_dir() else target.unlink()
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    with pytest.raises(ShardDamagedError, match="another store"):
        StoreReader(store).read(0)


def test_unknown_split_names_the_known_ones(store: Path) -> None:
    with pytest.raises(InputError, match=r"\['train', 'val'\], found 'test'"):
        StoreReader(store).members("test")


def test_empty_shard_reads_as_no_conversations(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, manifest(shards=1), write_files) as writer:
        writer.write_shard(0, [], {"quarantined": [{"reason": "all"}], "gates": {}})
        writer.finish()
    assert len(StoreReader(tmp_path)) == 0


def test_manifest_states_every_tap_convention(store: Path) -> None:
    assert StoreManifest.load(open_storage(store)).settings()["taps"][0] == {
        "layer": 1,
        "point": "output",
        "hf_hidden_states_index": 2,
        "vllm_aux_id": 2,
    }


@pytest.mark.parametrize("layout", ["zarr", "webdataset"])
@pytest.mark.parametrize(
    ("name", "shape"), [("tap_3", (30, 2, 8)), ("tap_3", (29, 8)), ("teacher_ids", (4, 5)), ("loss_mask", (31,))]
)
def test_arrays_of_another_shape_are_not_written(
    tmp_path: Path, layout: str, name: str, shape: tuple[int, ...]
) -> None:
    """Such a shard would be whole by its checksums, and nothing could read it."""
    item = conversation(np.random.default_rng(0), turns(30, (10, 14)))
    item.arrays[name] = np.zeros(shape, item.arrays[name].dtype)
    with (
        StoreWriter(tmp_path / "s", manifest(layout=layout, shards=1), write_files) as writer,
        writer.shard(0) as shard,
        pytest.raises(InputError, match=rf"{name}: expected an array of shape \[\d+.*\], found \[{shape[0]}"),
    ):
        shard.append(item)
