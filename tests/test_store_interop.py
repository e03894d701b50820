"""Other programs' zarr readers read our shards bit for bit, and we read shards whose files they wrote."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from numpy.typing import NDArray

from draftcache.store.common.files import hash_file
from draftcache.store.common.sealed_json import seal, unseal
from draftcache.store.format.tap_codecs import MODES
from draftcache.store.reader import StoreReader
from support.synthetic import write_store

ZARRS = """
import sys
import numpy, zarr, zarrs
zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
group = zarr.open_group(sys.argv[1], mode="r")
for name, array in group.arrays():
    assert type(array.async_array.codec_pipeline).__name__ == "ZarrsCodecPipeline"
    numpy.save(f"{sys.argv[2]}/{name}.npy", array[...])
"""


def with_zarr_python(shard: Path, name: str, scratch: Path) -> NDArray[Any]:
    array = zarr.open_group(shard, mode="r")[name]
    assert isinstance(array, zarr.Array)
    return np.asarray(array[...])


def with_tensorstore(shard: Path, name: str, scratch: Path) -> NDArray[Any]:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(shard / name)}}
    return np.asarray(tensorstore.open(spec, open=True).result().read().result())


def with_zarrs(shard: Path, name: str, scratch: Path) -> NDArray[Any]:
    """In a process of its own: its pipeline is a setting of the whole process."""
    if not (scratch / f"{name}.npy").exists():
        scratch.mkdir(exist_ok=True)
        subprocess.run([sys.executable, "-c", ZARRS, str(shard), str(scratch)], check=True)
    return np.asarray(np.load(scratch / f"{name}.npy", allow_pickle=False))


def stored(root: Path, shard: int) -> dict[str, NDArray[Any]]:
    """A shard's arrays as StoreReader finds them, conversation after conversation."""
    reader = StoreReader(root)
    numbers = np.flatnonzero(reader.index["shard"] == shard)
    parts = [reader.read(int(number), decode=False).arrays for number in numbers]
    return {name: np.concatenate([part[name] for part in parts]) for name in reader.specs}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("read", [with_zarr_python, with_tensorstore, with_zarrs])
def test_others_read_our_shards(tmp_path: Path, mode: str, read: Callable[[Path, str, Path], NDArray[Any]]) -> None:
    write_store(tmp_path / "store", mode=mode)
    for shard in range(2):
        for name, values in stored(tmp_path / "store", shard).items():
            found = read(tmp_path / "store" / "shards" / f"{shard:05d}", name, tmp_path / f"arrays-{shard}")
            assert (found.dtype, found.shape) == (values.dtype, values.shape)
            np.testing.assert_array_equal(found, values)


def rewrite_with_zarr_python(array: Path, values: NDArray[Any]) -> None:
    target = zarr.open_array(array, mode="r+")
    target[...] = values


def rewrite_with_tensorstore(array: Path, values: NDArray[Any]) -> None:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(array)}}
    # A chunk of zeros that a program leaves out can't be told from a lost one, and is refused by reading.
    tensorstore.open(spec, open=True).result().write(values).result()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("write", [rewrite_with_zarr_python, rewrite_with_tensorstore])
def test_we_read_shards_that_others_wrote(
    tmp_path: Path, mode: str, write: Callable[[Path, NDArray[Any]], None]
) -> None:
    root = tmp_path / "store"
    write_store(root, mode=mode)
    expected = stored(root, 0)
    record_path = root / "commit" / "00000.json"
    record = unseal(record_path.read_bytes(), "")
    rewritten = 0
    for name, values in expected.items():
        array = root / "shards" / "00000" / name
        (data,) = array.glob("c.*")
        data.unlink()
        write(array, values)
        rewritten += data.is_file()
        record["files"][str(data.relative_to(root))] = {"bytes": data.stat().st_size, "xxh3_128": hash_file(data)}
    assert rewritten == len(expected)
    record_path.write_bytes(seal(record))
    for name, values in stored(root, 0).items():
        np.testing.assert_array_equal(values, expected[name])
