"""Filesystems whose locks do not lock: two writers of one store damage nothing, and nothing foreign is touched."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draftcache.store.common import attempts
from draftcache.store.common.errors import InputError
from draftcache.store.format.commits import committed_shards, read_record
from draftcache.store.reader import StoreReader
from draftcache.store.shard_in_progress import ShardInProgress
from draftcache.store.storage.base import open_storage
from draftcache.store.verify import verify_store
from draftcache.store.writer import StoreWriter
from support.processes import ONE_THREAD
from support.synthetic import conversation, manifest, turns, write_files

ENVIRONMENT = ONE_THREAD | {"PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
EXTRA: dict[str, Any] = {"quarantined": [], "gates": {}}

# Two processes write 2 shards each with flock doing nothing; each shard's values differ from writer to writer, so that
# a mixture of two writers' files could not have right hashes.
WRITER = """
import fcntl, sys
fcntl.flock = lambda *_: None
import numpy as np
from pathlib import Path
from draftcache.store.writer import StoreWriter
from support.synthetic import conversation, manifest, turns, write_files
root, seed, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for number in range(rounds):
    with StoreWriter(root / f"{number:03d}", manifest(), write_files) as writer:
        for shard in range(2):
            begun = writer.shard(shard)
            if begun is None:
                continue
            with begun:
                generator = np.random.default_rng(seed)
                for _ in range(2):
                    begun.append(conversation(generator, turns(30, (4, 20)), split=shard))
                begun.commit({"quarantined": [], "gates": {}})
        writer.finish()
print("done")
"""


def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)


def fill(begun: Any, seed: int) -> Any:
    begun.append(conversation(np.random.default_rng(seed), turns(30, (4, 20))))
    return begun


@contextmanager
def two_attempts(root: Path) -> Iterator[tuple[ShardInProgress, ShardInProgress]]:
    """The same shard, begun by two writers of one store."""
    with StoreWriter(root, manifest(), write_files) as one, StoreWriter(root, manifest(), write_files) as two:
        first, second = one.shard(0), two.shard(0)
        assert first is not None
        assert second is not None
        yield first, second


def test_the_loser_of_two_writers_takes_nothing_from_the_winner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both hold the same shard at once. Whoever commits first counts, in every order of their steps."""
    no_locks(monkeypatch)
    root = tmp_path / "s"
    with two_attempts(root) as (first, second), first, second:
        assert fill(first, 1).commit(EXTRA)
        with StoreWriter(root, manifest(), write_files):  # a third one starts, and cleans up
            pass
        assert not fill(second, 2).commit(EXTRA)
    record = read_record(open_storage(root), "00000")
    assert record is not None
    assert [path.name for path in (root / "shards").iterdir()] == ["00000"]
    assert verify_store(root).damages == []
    found = StoreReader(root, allow_partial=True).read(0)
    expected = conversation(np.random.default_rng(1), turns(30, (4, 20)))
    np.testing.assert_array_equal(found.arrays["token_ids"], expected.arrays["token_ids"])


def test_a_published_shard_is_not_replaced_before_its_record_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_locks(monkeypatch)
    root = tmp_path / "s"
    with two_attempts(root) as (first, second):

        def rival(_record: object) -> None:
            with second:
                assert fill(second, 2).commit(EXTRA)

        with first:
            assert not fill(first, 1).commit(EXTRA, check=rival)
    assert verify_store(root).damages == []
    (left,) = (root / "shards").iterdir()
    assert left.name.startswith("00000-")  # the plain name was taken while the second one published


def test_two_processes_without_locks_damage_no_store(tmp_path: Path) -> None:
    rounds = 12
    with ExitStack() as ended:
        writers = [
            ended.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", WRITER, str(tmp_path), str(seed), str(rounds)],
                    env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                )
            )
            for seed in (1, 2)
        ]  # fmt: skip
        results = [(writer.communicate(timeout=120)[1], writer.returncode) for writer in writers]
    assert [code for _, code in results] == [0, 0], results
    for number in range(rounds):
        root = tmp_path / f"{number:03d}"
        report = verify_store(root)
        assert (report.damages, report.finished, report.strays) == ([], True, [])
        assert len(StoreReader(root)) == 4


def test_what_a_killed_writer_published_or_left_is_replaced(tmp_path: Path) -> None:
    """A process is killed between publishing a shard and its commit record; the next one makes the same store."""
    script = WRITER.replace("fcntl.flock = lambda *_: None", "").replace(
        'begun.commit({"quarantined": [], "gates": {}})',
        'begun.commit({}, check=lambda _: (print("published", flush=True), __import__("time").sleep(60)))',
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path), "1", "1"], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "published\n"
        os.kill(process.pid, signal.SIGKILL)
    root = tmp_path / "000"
    assert (root / "shards" / "00000").is_dir()
    assert committed_shards(open_storage(root)) == []
    with StoreWriter(root, manifest(), write_files) as writer:
        begun = writer.shard(0)
        assert begun is not None
        with begun:
            assert fill(begun, 3).commit(EXTRA)
    assert [path.name for path in (root / "shards").iterdir()] == ["00000"]
    assert verify_store(root).damages == []


def test_only_names_of_ended_processes_are_cleaned_up(tmp_path: Path) -> None:
    root = tmp_path / "s"
    with StoreWriter(root, manifest(), write_files):
        pass
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    machine = attempts.attempt_path(root).name.split(".")[2].partition("-")[0]
    gone = root / "shards" / f".00000.{machine}-{ended.pid}-00c0ffee.partial"
    alive = root / "shards" / f".00000.{machine}-{os.getppid()}-00c0ffee.partial"
    elsewhere = root / "commit" / f".00000.json.{'0' * 8}-{ended.pid}-00c0ffee.partial"
    foreign = root / "notes" / ".draft.partial"
    for path in (gone, alive, elsewhere, foreign):
        path.mkdir(parents=True)
    with StoreWriter(root, manifest(), write_files):
        pass
    assert [path.exists() for path in (gone, alive, elsewhere, foreign)] == [False, True, True, True]
    old = time.time() - 25 * 3600
    os.utime(elsewhere, (old, old))
    with StoreWriter(root, manifest(), write_files):
        pass
    assert not elsewhere.exists()
    assert foreign.exists()


@pytest.mark.parametrize("name", ["frozen.safetensors", "shards/00000/c.0", ".draft.partial", "letter.txt"])
def test_a_directory_of_other_files_is_refused_and_left_as_it_is(tmp_path: Path, name: str) -> None:
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"expected a store, or nothing yet, found .* choose another --output"):
        StoreWriter(tmp_path / "mine", manifest(), write_files)
    assert (sorted(tmp_path.rglob("*")), path.read_text()) == (before, "precious")


def test_an_empty_directory_and_a_creation_that_was_killed_are_used(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()

    def killed(directory: Path) -> list[Path]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        StoreWriter(tmp_path / "s", manifest(), killed)
    assert any((tmp_path / "s").iterdir())
    with StoreWriter(tmp_path / "s", manifest(), write_files) as writer:
        assert writer.committed() == set()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_filesystem_that_refuses_locks_is_written_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with StoreWriter(tmp_path / "s", manifest(), write_files) as writer:
        writer.write_shard(0, [conversation(np.random.default_rng(1), turns(30, (4, 20)))], EXTRA)
    assert verify_store(tmp_path / "s").damages == []
