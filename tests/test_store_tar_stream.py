"""Streams from tar shards: even shares, hostile members, damage; the webdataset library reads the same files."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from zstandard import ZstdDecompressor

from draftcache.store.common.errors import ShardDamagedError, StreamingError
from draftcache.store.common.files import hash_bytes, hash_file
from draftcache.store.common.sealed_json import seal, unseal
from draftcache.store.reader import StoreReader
from draftcache.store.tar_stream import Reader, TarStream
from draftcache.store.writer import StoreWriter
from support.synthetic import conversation, manifest, turns, write_files, write_store

COUNTS = (3, 1, 4, 2, 5)


def five_shards(root: Path, mode: str = "lossless") -> Path:
    """15 conversations in shards of unlike size."""
    rng = np.random.default_rng(0)
    made = manifest(shards=len(COUNTS), mode=mode, layout="webdataset")
    number = 0
    with StoreWriter(root, made, write_files) as writer:
        for shard, count in enumerate(COUNTS):
            items = [conversation(rng, turns(40, (5, 30)), number=number + k, mode=mode) for k in range(count)]
            number += count
            writer.write_shard(shard, items, {"quarantined": [], "gates": {}})
        writer.finish()
    return root


def seen(root: Path, world: int, workers: int = 1, **options: Any) -> list[list[list[int]]]:
    """Per rank its batches of dataset indexes, workers one after the other."""
    return [
        [
            [item.dataset_index for item in batch]
            for worker in range(workers)
            for batch in TarStream(root, reader=Reader(rank, world, worker, workers), **options)
        ]
        for rank in range(world)
    ]


@pytest.mark.parametrize(("world", "workers", "size"), [(1, 1, 1), (2, 1, 2), (2, 2, 1), (3, 2, 1), (5, 1, 1)])
def test_every_rank_gets_as_many_batches(tmp_path: Path, world: int, workers: int, size: int) -> None:
    root = five_shards(tmp_path)
    dropped = set()
    for epoch in range(8):
        ranks = seen(root, world, workers, batch_size=size, epoch=epoch)
        stream = TarStream(root, reader=Reader(0, world, 0, workers), batch_size=size, epoch=epoch)
        assert {len(batches) for batches in ranks} == {len(stream)}
        given = [number for batches in ranks for batch in batches for number in batch]
        assert len(given) == len(set(given)) == 15 - stream.dropped
        assert ranks == seen(root, world, workers, batch_size=size, epoch=epoch)
        dropped.add(frozenset(set(range(15)) - set(given)))
    if world in (2, 5):
        assert len(dropped) > 1  # not the same ones every time


def test_repeating_leaves_nothing_out(tmp_path: Path) -> None:
    ranks = seen(five_shards(tmp_path), 2, batch_size=2, uneven="repeat")
    assert len(ranks[0]) == len(ranks[1])
    given = {number for batches in ranks for batch in batches for number in batch}
    assert len(given) >= 14


def test_skipping_goes_on_where_it_was(tmp_path: Path) -> None:
    root = five_shards(tmp_path)
    assert seen(root, 2, skip_batches=3)[0] == seen(root, 2)[0][3:]


def test_the_library_alone_gives_ranks_unequal_counts(tmp_path: Path) -> None:
    """Why we deal shards out ourselves."""
    root = five_shards(tmp_path, "bf16")
    urls = [str(root / "shards" / f"{shard:05d}" / "data.tar") for shard in range(5)]
    counts = [sum(count for shard, count in enumerate(COUNTS) if shard % 2 == rank) for rank in range(2)]
    found = [sum(1 for url in urls[rank::2] for _ in library(Path(url))) for rank in range(2)]
    assert found == counts == [12, 3]


def library(path: Path) -> Any:
    """Samples as the webdataset library gives them."""
    with path.open("rb") as file:
        yield from webdataset.tariterators.group_by_keys(
            webdataset.tariterators.tar_file_expander([{"url": str(path), "stream": file}])
        )


def test_the_library_reads_the_same_arrays(tmp_path: Path) -> None:
    root = five_shards(tmp_path)
    reader = StoreReader(root)
    number = 0
    for shard in range(5):
        for sample in library(root / "shards" / f"{shard:05d}" / "data.tar"):
            expected = reader.read(number, decode=False).arrays
            for name, values in expected.items():
                data = sample.get(f"{name}.npy")
                if data is None:
                    data = ZstdDecompressor().decompress(sample[f"{name}.npy.zst"])
                np.testing.assert_array_equal(np.load(io.BytesIO(data), allow_pickle=False), values)
            number += 1
    assert number == len(reader)


DDP = """
import sys
sys.path.insert(0, sys.argv[4])
import torch
import torch.distributed as distributed
from draftcache.store.tar_stream import Reader, TarStream
rank = int(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[3]}", rank=rank, world_size=2)
steps = 0
for batch in TarStream(sys.argv[1], reader=Reader(rank, 2)):
    total = torch.tensor([float(len(batch))])
    distributed.all_reduce(total)  # waits for ever where the other rank has no batch left
    steps += 1
print(steps)
distributed.destroy_process_group()
"""


def test_two_ranks_that_reduce_every_batch_both_end(tmp_path: Path) -> None:
    root = five_shards(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    where = str(Path(__file__).parents[1])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DDP, str(root), str(rank), str(port), where], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert outputs[0] == outputs[1] == "7\n"


def test_what_a_stream_can_not_do(tmp_path: Path) -> None:
    root = five_shards(tmp_path / "tar")
    with pytest.raises(StreamingError, match=r"at least 6 shards.*found 5.*--shard-tokens"):
        TarStream(root, reader=Reader(0, 6))
    with pytest.raises(StreamingError, match="StoreReader"):
        TarStream(root)[3]
    with pytest.raises(StreamingError, match=r"expected a split of .*, found 'validation'"):
        TarStream(root, split="validation")
    with pytest.raises(StreamingError, match="lower the batch size"):
        TarStream(root, batch_size=99)
    write_store(tmp_path / "zarr")
    with pytest.raises(StreamingError, match=r"expected tar shards, found zarr.*convert"):
        TarStream(tmp_path / "zarr")


def retar(root: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], Any]) -> None:
    """Write shard 0 again with other members, under a record that fits: only the members can tell."""
    path = root / "shards" / "00000" / "data.tar"
    with tarfile.open(path) as tar:
        members = [(info, tar.extractfile(info).read()) for info in tar]  # type: ignore[union-attr]
    change(members)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for info, data in members:
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data))
    record_path = root / "commit" / "00000.json"
    record = unseal(record_path.read_bytes(), "")
    record["files"]["shards/00000/data.tar"] = {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)}
    record_path.write_bytes(seal(record))


def hostile(name: str, kind: bytes = tarfile.REGTYPE) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.linkname = "/etc/passwd" if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
    return info, b"x"


@pytest.mark.parametrize(
    "member",
    [
        hostile("../../etc/passwd"),
        hostile("/etc/passwd"),
        hostile("00-000000000/../x.npy"),
        hostile("00-000000000\\x.npy"),
        hostile("00-000000000.tap_1.pkl"),
        hostile("00-000000000.tap_1.npy", tarfile.SYMTYPE),
        hostile("00-000000000.tap_1.npy", tarfile.LNKTYPE),
        hostile("00-000000000.tap_1.npy", tarfile.CHRTYPE),
        hostile("00-000000000.tap_1.npy", tarfile.FIFOTYPE),
        hostile("00-000000000", tarfile.DIRTYPE),
    ],
    ids=lambda member: f"{member[0].name}-{member[0].type.decode()}",
)
@pytest.mark.parametrize("place", [0, 3])
def test_hostile_members_are_refused(tmp_path: Path, member: tuple[tarfile.TarInfo, bytes], place: int) -> None:
    root = five_shards(tmp_path)
    retar(root, lambda members: members.insert(place, member))
    with pytest.raises(ShardDamagedError, match="refused member"):
        list(TarStream(root))


def test_missing_doubled_and_swapped_members_are_refused(tmp_path: Path) -> None:
    def swap(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        members[1], members[2] = members[2], members[1]

    changes: list[Callable[[list[Any]], Any]] = [
        lambda members: members.pop(0),
        lambda members: members.pop(4),
        lambda members: members.pop(),
        lambda members: members.insert(2, members[1]),
        swap,
        lambda members: members.__delitem__(slice(len(members) // 3, None)),
    ]
    for number, change in enumerate(changes):
        root = five_shards(tmp_path / str(number))
        retar(root, change)
        with pytest.raises(ShardDamagedError, match="expected"):
            list(TarStream(root))


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    root = five_shards(tmp_path, "bf16")
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)

    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        place = next(n for n, (info, _) in enumerate(members) if info.name.endswith("tap_1.npy"))
        old = members[place][1]
        members[place] = members[place][0], buffer.getvalue()
        members[0] = (
            members[0][0],
            members[0][1].replace(hash_bytes(old).encode(), hash_bytes(buffer.getvalue()).encode()),
        )

    retar(root, change)
    with pytest.raises(ShardDamagedError, match=r"expected a \.npy array"):
        list(TarStream(root))


def test_every_flipped_payload_byte_and_a_cut_tar_are_noticed(tmp_path: Path) -> None:
    root = five_shards(tmp_path)
    path = root / "shards" / "00002" / "data.tar"
    original = path.read_bytes()
    table = np.load(path.with_name("members.npy"))["members"].reshape(-1)
    rng = np.random.default_rng(0)
    for _ in range(100):
        member = table[rng.integers(len(table))]
        damaged = bytearray(original)
        damaged[int(member["offset"]) + int(rng.integers(member["bytes"]))] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        with pytest.raises(ShardDamagedError):
            list(TarStream(root))
    path.write_bytes(original[:-2000])
    with pytest.raises(ShardDamagedError, match="cut or changed"):
        list(TarStream(root))
    path.write_bytes(original)
    assert sum(1 for _ in TarStream(root)) == 15
