"""What others leave in a store's directories: stray files, links, and two repairs within a second."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from draftcache.store.format.commits import committed_shards
from draftcache.store.reader import StoreReader
from draftcache.store.repair import repair_store
from draftcache.store.storage.base import open_storage
from draftcache.store.verify import verify_store
from draftcache.store.writer import StoreWriter
from draftcache.tools.cli import main
from support.synthetic import items_of, manifest, write_files, write_store


def write(root: Path, shards: int = 3) -> None:
    """Write whatever shards are missing, as capture does."""
    with StoreWriter(root, manifest(shards=shards), write_files) as writer:
        for shard in sorted(set(range(shards)) - writer.committed()):
            writer.write_shard(shard, items_of(shard), {"quarantined": [], "gates": {}})
        writer.finish()


STRAYS = (
    "commit/notes.txt",
    "commit/²³.json",
    "commit/7.json",
    "commit/00001.json.bak",
    "commit/00001",
    "commit/old/00009.json",
    "shards/²³",
    "shards/00001.txt",
    "shards/²/x",
    "shards/1",
)


@pytest.mark.parametrize("name", STRAYS)
def test_a_stray_file_stops_neither_verify_nor_repair_nor_reading(tmp_path: Path, name: str) -> None:
    write(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"x")
    assert committed_shards(open_storage(tmp_path)) == [0, 1, 2]
    assert main(["verify", str(tmp_path)]) == 0
    assert main(["inspect", str(tmp_path)]) == 0
    assert main(["repair", str(tmp_path)]) == 0
    assert len(list(StoreReader(tmp_path).records())) == 3
    (tmp_path / "shards" / "00002" / "argmax" / "c.0").unlink()
    assert verify_store(tmp_path).damaged_shards == [2]
    assert main(["repair", str(tmp_path)]) == 1
    write(tmp_path)
    assert main(["verify", str(tmp_path)]) == 0
    assert (tmp_path / name).read_bytes() == b"x"


def test_a_record_beyond_the_plan_is_damage(tmp_path: Path) -> None:
    write(tmp_path)
    shutil.copyfile(tmp_path / "commit" / "00001.json", tmp_path / "commit" / "00009.json")
    report = verify_store(tmp_path)
    assert [item.name for item in report.damages] == ["commit/00009.json"]
    repair_store(tmp_path, report)
    assert main(["verify", str(tmp_path)]) == 0


@pytest.mark.parametrize("relative", [True, False])
def test_a_symlinked_shard_directory(tmp_path: Path, relative: bool) -> None:
    """A shard that was moved to another disk is read; a damaged one is set aside as any other."""
    root, other = tmp_path / "s", tmp_path / "other disk"
    write(root)
    other.mkdir()
    (root / "shards" / "00001").rename(other / "00001")
    (root / "shards" / "00001").symlink_to(Path("../../other disk/00001") if relative else other / "00001")
    (other / "00001" / "stray").write_bytes(b"x")
    report = verify_store(root)
    assert (report.damages, report.strays) == ([], ["shards/00001/stray"])
    assert len(StoreReader(root).read(3).arrays) > 0
    (other / "00001" / "argmax" / "c.0").unlink()
    assert verify_store(root).damaged_shards == [1]
    repair = repair_store(root, verify_store(root))
    assert not (root / "shards" / "00001").exists()
    assert (root / repair.directory / "shards" / "00001" / "token_ids").is_dir()
    assert (other / "00001" / "token_ids").is_dir()
    write(root)
    assert verify_store(root).finished
    assert not verify_store(root).damages


def test_a_link_in_a_circle_is_walked_once(tmp_path: Path) -> None:
    write_store(tmp_path)
    (tmp_path / "shards" / "loop").symlink_to(tmp_path / "shards")
    assert main(["verify", str(tmp_path)]) == 0
    names = open_storage(tmp_path).list("shards")
    assert not [name for name in names if "loop/loop" in name]


def test_two_repairs_within_a_second(tmp_path: Path) -> None:
    write(tmp_path)
    directories = set()
    for _ in range(3):
        (tmp_path / "shards" / "00001" / "argmax" / "c.0").unlink()
        directories.add(repair_store(tmp_path, verify_store(tmp_path)).directory)
        write(tmp_path)
    assert len(directories) == 3
    assert all((tmp_path / name / "shards" / "00001" / "token_ids").is_dir() for name in directories)
    assert all((tmp_path / name / "commit" / "00001.json").is_file() for name in directories)
    assert not verify_store(tmp_path).damages
