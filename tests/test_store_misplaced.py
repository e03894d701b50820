"""Files of a store that lie in the wrong place: whole in themselves, yet another shard's or another store's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from draftcache.store.common.errors import ShardDamagedError
from draftcache.store.common.sealed_json import seal, unseal
from draftcache.store.format.bf16 import float32_to_bf16
from draftcache.store.reader import StoreReader
from draftcache.store.repair import repair_store
from draftcache.store.tar_stream import TarStream
from draftcache.store.verify import verify_store
from draftcache.store.writer import StoreWriter
from draftcache.tools.cli import main
from support.synthetic import items_of, manifest, write_files, write_store


def write(root: Path, **changes: object) -> Path:
    """Three shards of three conversations each, all of one size."""
    made = manifest(shards=3, mode="bf16", **changes)
    with StoreWriter(root, made, write_files) as writer:
        for shard in range(3):
            items = items_of(shard)
            for item in items:
                for layer in made.layers:
                    item.arrays[f"tap_{layer}"] = float32_to_bf16(item.arrays[f"tap_{layer}"])
            writer.write_shard(shard, items, {"quarantined": [], "gates": {}})
        writer.finish()
    return root


def exchange(one: Path, two: Path) -> None:
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def read_all(root: Path) -> None:
    reader = StoreReader(root)
    try:
        _ = [reader.read(number) for number in range(len(reader))], reader.files
    finally:
        reader.close()


@pytest.mark.parametrize("layout", ["zarr", "webdataset"])
def test_two_commit_records_exchanged(tmp_path: Path, layout: str) -> None:
    root = write(tmp_path / "s", layout=layout)
    exchange(root / "commit" / "00000.json", root / "commit" / "00002.json")
    with pytest.raises(ShardDamagedError, match=r"expected the record of shards/00000, found that of shards/00002"):
        read_all(root)
    with pytest.raises(ShardDamagedError, match=r"put the right one back"):
        list(StoreReader(root).records())
    assert verify_store(root, quick=True).damaged_shards == [0, 2]
    assert main(["verify", str(root)]) == 1
    assert main(["convert", str(root), str(tmp_path / "copy")]) == 2


def test_an_array_file_of_another_shard_of_equal_size(tmp_path: Path) -> None:
    root = write(tmp_path / "s")
    one, two = (root / "shards" / shard / "tap_3" / "c.0.0" for shard in ("00000", "00001"))
    assert one.stat().st_size == two.stat().st_size
    shutil.copyfile(two, one)
    reader = StoreReader(root)
    with pytest.raises(ShardDamagedError, match=r"00000/tap_3/c.0.0: expected an array .* another file of the same"):
        reader.read(0)
    reader.read(3)
    assert verify_store(root).damaged_shards == [0]


def test_an_array_file_of_another_store_of_equal_size(tmp_path: Path) -> None:
    """Every array file with other values is refused, with all its checksums right."""
    one, two = write(tmp_path / "one"), tmp_path / "two"
    shutil.copytree(one, two)
    for name in ("token_ids", "tap_1", "teacher_ids", "argmax", "log_z_full"):
        paths = sorted((one / "shards" / "00001" / name).glob("c.*"))
        assert len(paths) == 1
        target = two / "shards" / "00000" / name / paths[0].name
        original = target.read_bytes()
        if len(original) != paths[0].stat().st_size:
            continue
        shutil.copyfile(paths[0], target)
        with pytest.raises(ShardDamagedError, match=name):
            StoreReader(two).read(0)
        target.write_bytes(original)
    read_all(two)


def test_a_tar_file_of_another_shard_of_equal_size(tmp_path: Path) -> None:
    root = write(tmp_path / "s", layout="webdataset")
    one, two = (root / "shards" / shard / "data.tar" for shard in ("00000", "00001"))
    size = max(path.stat().st_size for path in (one, two))
    for path in (one, two):  # a tar file may end in any number of empty blocks
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
        recorded = root / "commit" / f"{path.parent.name}.json"
        record = unseal(recorded.read_bytes(), "")
        record["files"][f"shards/{path.parent.name}/data.tar"]["bytes"] = size
        recorded.write_bytes(seal(record))
    assert sum(len(batch) for batch in TarStream(root)) == 9
    exchange(one, two)
    with pytest.raises(ShardDamagedError, match=r"another shard's file took its place"):
        list(TarStream(root))
    with pytest.raises(ShardDamagedError):
        read_all(root)


@pytest.mark.parametrize("name", ["frozen.safetensors", "index.npy"])
def test_a_top_level_file_with_the_record_of_another_store(tmp_path: Path, name: str) -> None:
    one, two = write(tmp_path / "one"), write(tmp_path / "two", dataset_hash="another")
    for path in (name, f"commit/{Path(name).stem}.json"):
        shutil.copyfile(two / path, one / path)
    with pytest.raises(ShardDamagedError, match=rf"{Path(name).stem}.json: .* it was copied from another store"):
        read_all(one)
    for flags in ([], ["--quick"]):
        assert main(["verify", str(one), *flags]) == 1
    assert [item.name for item in verify_store(one).damages] == [name]
    repair_store(one, verify_store(one))
    with StoreWriter(one, manifest(shards=3, mode="bf16"), write_files) as writer:
        writer.finish()
    assert not verify_store(one).damages
    read_all(one)


def test_files_of_a_job_that_began_the_store_at_the_same_time(tmp_path: Path) -> None:
    """In a bucket two jobs may calibrate at once: the manifest of one counts, with the equal files of either."""
    one, two = write(tmp_path / "one"), write(tmp_path / "two", norm_bands={})
    for path in ("frozen.safetensors", "commit/frozen.json", "vocab_map.safetensors", "commit/vocab_map.json"):
        shutil.copyfile(two / path, one / path)
    assert StoreReader(one).manifest.hash != StoreReader(two).manifest.hash
    read_all(one)
    assert not verify_store(one).damages
    StoreWriter(one, manifest(shards=3, mode="bf16"), write_files).__exit__(None, None, None)


def test_a_shard_of_another_store(tmp_path: Path) -> None:
    write_store(tmp_path / "one")
    write_store(tmp_path / "two", dataset_hash="another")
    for part in ("shards/00001", "commit/00001.json"):
        source, target = tmp_path / "two" / part, tmp_path / "one" / part
        if source.is_dir():
            shutil.rmtree(target)
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
    with pytest.raises(ShardDamagedError, match="copied from another store"):
        read_all(tmp_path / "one")
    assert verify_store(tmp_path / "one", quick=True).damaged_shards == [1]
