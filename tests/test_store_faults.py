"""Kills, flips, full disks and vanished files, on real stores and real processes; then verify and repair."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr

from draftcache.store.common.errors import DraftcacheError, ShardDamagedError, StorageError, StoreError
from draftcache.store.format.commits import committed_shards, read_record, shard_name
from draftcache.store.format.frozen import FROZEN_NAME
from draftcache.store.format.schema import Conversation
from draftcache.store.reader import StoreReader
from draftcache.store.repair import repair_store
from draftcache.store.storage.base import open_storage
from draftcache.store.verify import verify_store
from draftcache.store.writer import StoreWriter
from draftcache.tools.cli import main
from support.synthetic import conversation, items_of, manifest, turns, write_files, write_store

SHARDS = 12
KILLS = 200
MODES = ("bf16", "lossless", "int8", "fp8")


def write_all(root: Path, shards: int = SHARDS) -> None:
    """What a capture worker does: take whichever shard is free, until all are committed."""
    with StoreWriter(root, manifest(shards=shards), write_files) as writer:
        while not writer.finish():
            for shard in range(shards):
                begun = writer.shard(shard)
                if begun is None:
                    continue
                with begun:
                    for item in items_of(shard):
                        begun.append(item)
                    begun.commit({"quarantined": [], "gates": {}})


def fork(root: Path) -> int:
    """A worker in a process of its own; forked, because starting Python 200 times would be all that is tested."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            write_all(root)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def content(root: Path) -> dict[str, bytes]:
    paths = [path for path in root.rglob("*") if path.is_file() and ".locks" not in path.parts]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


@pytest.mark.slow
def test_two_writers_killed_200_times_then_finished_equal_an_uninterrupted_one(tmp_path: Path) -> None:
    write_all(tmp_path / "whole")
    rng = np.random.default_rng(0)
    kills = rounds = 0
    while kills < KILLS:
        rounds += 1
        root = tmp_path / f"cut{rounds}"
        seen: dict[int, object] = {}
        while not (root / "commit" / "index.json").exists():
            children = [fork(root), fork(root)]
            time.sleep(float(rng.exponential(0.06)))
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
            statuses = [os.waitpid(child, 0)[1] for child in children]
            assert all(os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0 for status in statuses)
            kills += sum(os.WIFSIGNALED(status) for status in statuses)
            if not (root / "commit").exists():
                continue
            storage = open_storage(root)
            records = {shard: read_record(storage, shard_name(shard)) for shard in committed_shards(storage)}
            assert seen.items() <= records.items()  # none lost, none redone
            seen = dict(records)
        write_all(root)  # the same command again removes what is left over
        assert content(root) == content(tmp_path / "whole")
        assert not verify_store(root).damages
        shutil.rmtree(root)
    assert rounds > 1


QUICK = [("zarr", "lossless"), ("zarr", "int8"), ("webdataset", "lossless")]
"""Layouts and modes whose arrays are like those of all others."""
REST = [(layout, mode) for layout in ("zarr", "webdataset") for mode in MODES if (layout, mode) not in QUICK]


@pytest.mark.parametrize(("layout", "mode"), [*QUICK, *(pytest.param(*rest, marks=pytest.mark.slow) for rest in REST)])
def test_every_flip_is_found_by_verify_and_by_reading_the_rows_it_touches(
    tmp_path: Path, mode: str, layout: str
) -> None:
    """300 flips in each of eight stores, over all files; reading must notice all in what it reads."""
    source, root = tmp_path / "source", tmp_path / "store"
    write_store(source, per_shard=2, mode=mode, layout=layout)
    shutil.copytree(source, root)
    rng = np.random.default_rng(1)
    files = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file() and ".locks" not in path.parts)
    sizes = np.array([(root / path).stat().st_size for path in files], float)
    weights = np.sqrt(sizes) / np.sqrt(sizes).sum()  # small files are hit often too
    read_notices = 0
    for _ in range(300):
        relative = files[rng.choice(len(files), p=weights)]
        path = root / relative
        original = path.read_bytes()
        damaged = bytearray(original)
        damaged[rng.integers(len(damaged))] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            found = verify_store(root).damages
        except StoreError:  # not a store of this version any more
            assert relative.name == "manifest.json"
        else:
            assert found, relative
        if must_break_reading(relative, layout, original, damaged):
            read_notices += 1
            with pytest.raises(DraftcacheError):
                read_everything(root)
        path.write_bytes(original)
    assert read_notices > 100
    assert not verify_store(root).damages
    read_everything(root)


def must_break_reading(relative: Path, layout: str, original: bytes, damaged: bytearray) -> bool:
    """Whether the flip lies in what reading takes: zarr's metadata and tar's headers and padding serve others."""
    if relative.parts[0] != "shards":
        return True
    if relative.name in ("zarr.json", "index.npy"):
        return False
    if layout == "zarr" or relative.name == "members.npy":
        return True
    place = next(number for number, (one, two) in enumerate(zip(original, damaged, strict=True)) if one != two)
    table = np.load(Path(os.environ["FLIP_ROOT"], relative).with_name("members.npy"))["members"].reshape(-1)
    return bool(((table["offset"] <= place) & (place < table["offset"] + table["bytes"])).any())


@pytest.fixture(autouse=True)
def flip_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLIP_ROOT", str(tmp_path / "source"))


def read_everything(root: Path) -> None:
    reader = StoreReader(root)
    _ = [reader.read(number) for number in range(len(reader))]
    _ = reader.vocab_map(), reader.files
    reader.close()


def test_verify_names_the_damaged_conversations(tmp_path: Path) -> None:
    root = tmp_path / "s"
    with StoreWriter(root, manifest(shards=1), write_files) as writer:
        rng = np.random.default_rng(0)
        items = [conversation(rng, turns(600, (10, 590)), number=number) for number in range(5)]
        writer.write_shard(0, items, {"quarantined": [], "gates": {}})
        writer.finish()
    path = root / "shards" / "00000" / "tap_3" / "c.0.0"
    data = bytearray(path.read_bytes())
    data[(2048 * 8 * 4 + 4) + 100] ^= 1  # chunk 1: rows 2048 to 4095
    path.write_bytes(data)
    (damage,) = verify_store(root).damages
    assert damage.name == "shards/00000/tap_3/c.0.0"
    index = StoreReader(root).index
    touched = [
        int(row["dataset_index"]) for row in index if row["first_row"] < 4096 and row["first_row"] + row["rows"] > 2048
    ]
    assert [item["dataset_index"] for item in damage.conversations] == touched
    assert 0 < len(touched) < 5


def test_verify_looks_at_values_too(tmp_path: Path) -> None:
    """Content that was wrong before it was hashed: checksums hold, verify still says so."""
    good = items_of(0)
    wrong = {
        "NaN": ("tap_1", np.float32(np.nan), "finite"),
        "zero row": ("tap_3", np.float32(0), "non-zero"),
        "order": ("teacher_gaps", np.float16(3), "ascending"),
        "token": ("token_ids", np.uint32(7), "hash"),
        "position": ("positions", np.int32(1), "reach"),
        "mass": ("log_z_draft", np.float32(-50), "log_z_draft >= teacher_max"),
    }
    for label, (name, value, expected) in wrong.items():
        arrays = {key: array.copy() for key, array in good[1].arrays.items()}
        arrays[name][5] = value if name != "token_ids" else (arrays[name][5] + 1) % 40
        if name == "teacher_gaps":
            arrays[name][5] = [0, 3, 2, 4, 5, 6]
        bad = Conversation(content_hash=good[1].content_hash, split=0, dataset_index=1, arrays=arrays)
        with StoreWriter(tmp_path / label, manifest(shards=1), write_files) as writer:
            writer.write_shard(0, [good[0], bad, good[2]], {"quarantined": [], "gates": {}})
            writer.finish()
        damages = verify_store(tmp_path / label).damages
        assert any(expected in damage.problem for damage in damages), (label, damages)
        assert {item["dataset_index"] for damage in damages for item in damage.conversations} == {1}


def test_quick_verify_sees_sizes_and_records_only(tmp_path: Path) -> None:
    write_store(tmp_path)
    path = tmp_path / "shards" / "00001" / "tap_3" / "c.0.0"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert not verify_store(tmp_path, quick=True).damages
    assert verify_store(tmp_path).damaged_shards == [1]
    path.unlink()
    assert verify_store(tmp_path, quick=True).damaged_shards == [1]


def test_many_shards_are_verified_by_several_processes(tmp_path: Path) -> None:
    write_all(tmp_path)
    (tmp_path / "shards" / "00007" / "token_ids" / "c.0").write_bytes(b"")
    report = verify_store(tmp_path, workers=2)
    assert (report.damaged_shards, report.conversations, report.finished) == ([7], 3 * SHARDS, True)


def test_commands_verify_repair_redo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_all(tmp_path / "s")
    before = content(tmp_path / "s")
    assert main(["verify", str(tmp_path / "s")]) == 0
    shutil.rmtree(tmp_path / "s" / "shards" / "00003" / "tap_1")
    (tmp_path / "s" / FROZEN_NAME).write_bytes(b"short")
    assert main(["verify", str(tmp_path / "s"), "--quick", "--json"]) == 1
    assert json.loads(capsys.readouterr().out.partition("{")[2].join("{ "))["damaged_shards"] == [3]
    with pytest.raises(ShardDamagedError, match="found no file"):
        read_everything(tmp_path / "s")
    assert main(["repair", str(tmp_path / "s")]) == 1
    assert "run the same capture command" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "s"), "--allow-partial"]) == 1  # the frozen weights are missing still
    write_all(tmp_path / "s")
    assert main(["verify", str(tmp_path / "s")]) == 0
    assert main(["repair", str(tmp_path / "s")]) == 0
    after = content(tmp_path / "s")
    quarantined = {name: after.pop(name) for name in list(after) if name.startswith("quarantine/")}
    assert after == before
    assert any(name.endswith("shards/00003/tap_3/c.0.0") for name in quarantined)


def test_a_record_that_vanished_from_a_finished_store_is_damage(tmp_path: Path) -> None:
    write_store(tmp_path)
    (tmp_path / "commit" / "00001.json").unlink()
    report = verify_store(tmp_path)
    assert report.damaged_shards == [1]
    repair_store(tmp_path, report)
    assert not (tmp_path / "commit" / "index.json").exists()


def test_repair_rebuilds_a_damaged_index(tmp_path: Path) -> None:
    write_store(tmp_path)
    before = content(tmp_path)
    (tmp_path / "index.npy").write_bytes(b"?" * (tmp_path / "index.npy").stat().st_size)
    with pytest.raises(ShardDamagedError, match="index"):
        StoreReader(tmp_path)
    assert repair_store(tmp_path, verify_store(tmp_path)).index_rebuilt
    assert content(tmp_path) == before


def test_repair_waits_for_nobody_and_disturbs_nobody(tmp_path: Path) -> None:
    write_store(tmp_path)
    (tmp_path / "shards" / "00001" / "token_ids" / "c.0").unlink()
    with StoreWriter(tmp_path, manifest(), write_files), pytest.raises(StoreError, match="another job"):
        repair_store(tmp_path, verify_store(tmp_path))


@contextlib.contextmanager
def small_disk(path: Path, size: str, option: str = "rw") -> Iterator[None]:
    """A file system of its own; needs the right to mount."""
    path.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size},{option}", "tmpfs", str(path)]
    if not shutil.which("mount") or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_is_a_clear_error_and_loses_nothing(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "8M"):
        with pytest.raises(StorageError, match=r"No space left on device.*committed before is untouched"):
            write_all(tmp_path / "disk" / "s", 100)
        report = verify_store(tmp_path / "disk" / "s")
        assert 0 < report.committed < 100
        assert not report.damages
        subprocess.run(["mount", "-o", "remount,size=100M", str(tmp_path / "disk")], check=True)
        write_all(tmp_path / "disk" / "s", 100)
        assert not list((tmp_path / "disk" / "s" / "shards").glob(".*"))
        assert not verify_store(tmp_path / "disk" / "s", quick=True).damages


def test_a_read_only_directory_is_a_clear_error(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1M"):
        write_store(tmp_path / "disk" / "s")
        (tmp_path / "disk" / "s" / "commit" / "index.json").unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        with pytest.raises(StorageError, match="Read-only file system"):
            StoreWriter(tmp_path / "disk" / "s", manifest(), write_files)
        assert len(StoreReader(tmp_path / "disk" / "s", allow_partial=True)) == 8
        assert not verify_store(tmp_path / "disk" / "s").damages


LIMITED = """
import resource, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from support.synthetic import items_of, manifest, write_files
from draftcache.store.common.errors import StorageError
from draftcache.store.writer import StoreWriter
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with StoreWriter(Path(sys.argv[1]), manifest(shards=2), write_files) as writer:
    writer.write_shard(0, items_of(0), {"quarantined": [], "gates": {}})
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        writer.write_shard(1, items_of(1), {"quarantined": [], "gates": {}})
    except StorageError as exc:
        print(exc)
"""


def test_a_refused_write_needs_no_right_to_mount(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED, str(tmp_path), str(Path(__file__).parent)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "File too large" in result.stdout
    assert committed_shards(open_storage(tmp_path)) == [0]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 2000


def test_zarr_libraries_that_fill_in_zeros_are_not_believed(tmp_path: Path) -> None:
    """What zarr reads as zeros without a word, we refuse."""
    write_store(tmp_path)
    (tmp_path / "shards" / "00000" / "tap_1" / "c.0.0").unlink()
    group = zarr.open_group(tmp_path / "shards" / "00000", mode="r")
    assert not np.asarray(group["tap_1"][...]).any()  # type: ignore[index, arg-type]
    with pytest.raises(ShardDamagedError, match="found no file"):
        StoreReader(tmp_path).read(0)


def test_strangers_below_shards_are_strays(tmp_path: Path) -> None:
    """A file that no shard's name leads to is reported, and stops neither verify nor repair."""
    write_store(tmp_path / "s")
    (tmp_path / "s" / "shards" / "notes").mkdir()
    (tmp_path / "s" / "shards" / "notes" / "a.txt").write_text("x")
    (tmp_path / "s" / "shards" / "readme.md").write_text("x")
    report = verify_store(tmp_path / "s")
    assert report.damages == []
    assert report.strays == ["shards/notes/a.txt", "shards/readme.md"]
    (tmp_path / "s" / "commit" / "00001.json").unlink()
    repair = repair_store(tmp_path / "s", verify_store(tmp_path / "s"))
    assert repair.shards == [1]
    assert (tmp_path / "s" / "shards" / "notes" / "a.txt").is_file()
