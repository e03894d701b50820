"""Files that can't be read, with hashes that were recorded after the damage: verify reports what reading refuses."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from awscrt.checksums import crc32c

from draftcache.store.common.errors import DraftcacheError
from draftcache.store.common.files import hash_file
from draftcache.store.common.sealed_json import seal, unseal
from draftcache.store.reader import StoreReader
from draftcache.store.tar_stream import TarStream
from draftcache.store.verify import verify_store
from draftcache.tools.cli import main
from support.synthetic import write_store

RECORD = "commit/00001.json"


def record_of(root: Path, name: str = RECORD) -> dict[str, Any]:
    return unseal((root / name).read_bytes(), name)


def record_again(root: Path, file: str, name: str = RECORD) -> None:
    """Record the size and the hash that a file has now, as a writer with bad memory would have."""
    record = record_of(root, name)
    record["files"][file] = {"bytes": (root / file).stat().st_size, "xxh3_128": hash_file(root / file)}
    (root / name).write_bytes(seal(record))


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def read_everything(root: Path) -> None:
    reader = StoreReader(root)
    try:
        for number in range(len(reader)):
            reader.read(number)
        _ = reader.files, reader.vocab_map()
    finally:
        reader.close()
    if reader.manifest.layout == "webdataset":
        list(TarStream(root))


def test_a_chunk_whose_crc_is_wrong_under_a_file_hash_that_is_right(tmp_path: Path) -> None:
    write_store(tmp_path, mode="bf16")
    file = "shards/00001/tap_3/c.0.0"
    flip(tmp_path / file, 5)
    record_again(tmp_path, file)
    with pytest.raises(DraftcacheError, match="crc32c"):
        read_everything(tmp_path)
    (damage,) = verify_store(tmp_path).damages
    assert (damage.name, damage.shard) == ("shards/00001/tap_3", 1)
    assert "rows 0 to" in damage.problem
    assert len(damage.conversations) == 4
    assert main(["verify", str(tmp_path)]) == 1


def test_a_compressed_chunk_of_garbage_with_the_right_crc(tmp_path: Path) -> None:
    write_store(tmp_path)
    file = "shards/00001/token_ids/c.0"
    data = bytearray((tmp_path / file).read_bytes())
    chunk = len(data) - 16 - 4 - 4
    data[:chunk] = b"\x55" * chunk
    data[chunk : chunk + 4] = crc32c(bytes(data[:chunk])).to_bytes(4, "little")
    (tmp_path / file).write_bytes(data)
    record_again(tmp_path, file)
    with pytest.raises(DraftcacheError):
        read_everything(tmp_path)
    assert verify_store(tmp_path).damaged_shards == [1]


ZARR_FILES = ("index.npy", "zarr.json", "tap_1/c.0.0", "tap_1/zarr.json", "argmax/c.0")


@pytest.mark.parametrize(
    ("layout", "file"),
    [*(("zarr", name) for name in ZARR_FILES), *(("webdataset", f"{name}") for name in ("data.tar", "members.npy"))],
)
@pytest.mark.parametrize("flags", [[], ["--quick"]])
def test_a_record_that_lacks_a_file(tmp_path: Path, layout: str, file: str, flags: list[str]) -> None:
    write_store(tmp_path, layout=layout)
    record = record_of(tmp_path)
    del record["files"][f"shards/00001/{file}"]
    (tmp_path / RECORD).write_bytes(seal(record))
    assert main(["verify", str(tmp_path), *flags]) == 1
    damages = verify_store(tmp_path, quick=bool(flags)).damages
    assert f"shards/00001/{file}" in {item.name for item in damages}
    assert any("found no entry" in item.problem for item in damages)


@pytest.mark.parametrize("name", ["frozen.safetensors", "vocab_map.safetensors", "index.npy"])
@pytest.mark.parametrize("flags", [[], ["--quick"]])
def test_a_top_level_record_that_lacks_its_file(tmp_path: Path, name: str, flags: list[str]) -> None:
    write_store(tmp_path)
    record = f"commit/{Path(name).stem}.json"
    (tmp_path / record).write_bytes(seal(record_of(tmp_path, record) | {"files": {}}))
    with pytest.raises(DraftcacheError, match="found no entry"):
        read_everything(tmp_path)
    assert main(["verify", str(tmp_path), *flags]) == 1
    assert [item.name for item in verify_store(tmp_path, quick=bool(flags)).damages] == [name]


@pytest.mark.parametrize("field", ["directory", "lengths", "conversations", "manifest_hash", "files"])
@pytest.mark.parametrize("value", [None, 3.5, [], {"a": 1}])
def test_a_record_of_another_form(tmp_path: Path, field: str, value: object) -> None:
    write_store(tmp_path)
    (tmp_path / RECORD).write_bytes(seal(record_of(tmp_path) | {field: value}))
    with pytest.raises(DraftcacheError):
        read_everything(tmp_path)
    assert verify_store(tmp_path).damaged_shards == [1]


@pytest.mark.parametrize("name", ["frozen.safetensors", "vocab_map.safetensors", "index.npy"])
def test_a_top_level_file_that_is_no_such_file(tmp_path: Path, name: str) -> None:
    write_store(tmp_path)
    (tmp_path / name).write_bytes(b"\x10" + bytes(99))
    record_again(tmp_path, name, f"commit/{Path(name).stem}.json")
    assert main(["verify", str(tmp_path)]) == 1
    assert [item.name for item in verify_store(tmp_path).damages] == [name]


def test_a_tar_member_that_only_a_stream_refuses(tmp_path: Path) -> None:
    """The name in a member's header: reads at random pass it by."""
    write_store(tmp_path, layout="webdataset")
    flip(tmp_path / "shards" / "00001" / "data.tar", 3)
    record_again(tmp_path, "shards/00001/data.tar")
    with pytest.raises(DraftcacheError):
        read_everything(tmp_path)
    assert [item.name for item in verify_store(tmp_path).damages] == ["shards/00001/data.tar"]


@pytest.mark.parametrize(("layout", "mode"), [("zarr", "lossless"), ("zarr", "fp8"), ("webdataset", "int8")])
def test_whatever_reading_refuses_verify_reports(tmp_path: Path, layout: str, mode: str) -> None:
    """Random damage whose hash is recorded after, in every kind of file."""
    write_store(tmp_path, per_shard=2, layout=layout, mode=mode)
    rng = np.random.default_rng(0)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "shards" / "00001").rglob("*.*"))
    whole = (tmp_path / RECORD).read_bytes()
    refused = 0
    for number in range(80):
        file = files[number % len(files)]
        path = tmp_path / file
        original = path.read_bytes()
        damaged = bytearray(original)
        damaged[rng.integers(len(damaged))] ^= int(rng.integers(1, 256))
        if number % 7 == 0:
            del damaged[int(rng.integers(len(damaged))) :]
        path.write_bytes(damaged)
        record_again(tmp_path, file)
        refusal = None
        try:
            read_everything(tmp_path)
        except DraftcacheError as exc:
            refusal = exc
        if refusal is not None:
            refused += 1
            assert verify_store(tmp_path).damaged_shards == [1], (file, refusal)
        else:
            with contextlib.suppress(DraftcacheError):
                verify_store(tmp_path)
        path.write_bytes(original)
        (tmp_path / RECORD).write_bytes(whole)
    assert refused > 20
    assert not verify_store(tmp_path).damages
