"""Verification that goes on after a kill, by a journal, and how it ends when it is interrupted."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from draftcache.capture.prepare.token_dataset import FORMAT
from draftcache.store import verify
from draftcache.store.common.errors import InputError, WorkerError
from draftcache.store.common.files import hash_file
from draftcache.store.common.locks import take_lock
from draftcache.store.common.sealed_json import seal, unseal
from draftcache.store.verify import verify_store
from draftcache.tools.cli import main
from support.processes import children, wait_for
from support.verified_stores import SHARDS, damage, flip, read_from_disk, write
from support.watched_checks import WatchedChecks


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write(tmp_path / "s")


# --- the journal


def test_a_killed_verification_goes_on_where_it_was(store: Path, tmp_path: Path) -> None:
    """Killed by SIGKILL in the middle; the same command reads the rest, and reports what one run reports."""
    damage(store, 1)
    damage(store, 8)
    watched, journal = WatchedChecks(tmp_path / "w"), tmp_path / "notes" / "j"
    words = ["verify", store, "--workers", "1", "--json", "--journal", journal]
    with watched.start(*words, seconds=0.15) as process:
        wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 5)
        process.kill()
        out, _ = process.communicate()
    assert (process.returncode, out) == (-signal.SIGKILL, "")
    noted = [json.loads(line) for line in journal.read_text().splitlines()[1:]]
    good = {note["shard"] for note in noted if not note["damages"]}
    assert {note["shard"] for note in noted} - good == {1}
    code, out, err = watched.run(*words)
    assert watched.checked() == sorted(set(range(SHARDS)) - good)  # the damaged one is looked at again
    assert code == 1
    resumed = json.loads(out)
    assert resumed.pop("from_journal") == len(good) >= 3
    assert re.search(r"verify:  [1-9]\d%", err.splitlines()[1])  # the bar starts where it was
    whole = json.loads(watched.run(*words[:-2])[1])
    assert watched.checked() == list(range(SHARDS))
    assert whole.pop("from_journal") == 0
    assert resumed == whole
    assert whole["damaged_shards"] == [1, 8]
    assert not journal.exists()  # the verification has ended: another one begins at the beginning


def test_a_killed_verification_of_several_processes_goes_on(store: Path, tmp_path: Path) -> None:
    watched, journal = WatchedChecks(tmp_path / "w"), tmp_path / "j"
    words = ["verify", store, "--workers", "2", "--journal", journal]
    with watched.start(*words, seconds=0.2) as process:
        wait_for(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 3)
        workers = children(process.pid)
        process.kill()
        process.communicate(timeout=30)  # which a worker that lives on would hold up
    assert len(workers) == 2
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), 10)
    good = {json.loads(line)["shard"] for line in journal.read_text().splitlines()[1:]}
    code, out, _ = watched.run(*words)
    assert watched.checked() == sorted(set(range(SHARDS)) - good)
    assert (code, 0 < len(good) < SHARDS) == (0, True)
    assert "10 shards read in full, 0 by record and file sizes only, 0 not looked at" in out
    assert f"{len(good)} of them were checked by an earlier run, and found good, by the journal" in out


@pytest.fixture
def notes(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The journal of a verification of the store that was interrupted after it had noted every shard."""
    return interrupted(store, tmp_path / "notes", monkeypatch)


def interrupted(store: Path, path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Path:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(verify, "_strays", interrupt)
        with pytest.raises(KeyboardInterrupt):
            verify_store(store, workers=1, journal=path, **settings)
    return path


def test_good_shards_of_a_journal_are_not_read_again(store: Path, notes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The positive control of the tests below."""
    read, report = read_from_disk(store, monkeypatch, journal=notes)
    assert (read, report.from_journal, report.read_in_full) == ([], SHARDS, SHARDS)


def test_a_shard_whose_record_has_changed_is_checked_again(
    store: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte of an array changes, and its record with it: the hashes fit, and only reading finds the damage."""
    damage(store, 4)
    path = store / "commit" / "00004.json"
    record = unseal(path.read_bytes(), "")
    changed = "shards/00004/token_ids/c.0"
    record["files"][changed]["xxh3_128"] = hash_file(store / changed)
    path.write_bytes(seal(record))
    read, report = read_from_disk(store, monkeypatch, journal=notes)
    assert read == [4]
    assert report.damaged_shards == [4]


def test_a_damaged_line_is_ignored_and_its_shard_checked_again(
    store: Path, notes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = notes.read_bytes()
    starts = [match.end() for match in re.finditer(rb"\n", original)][:-1]
    assert len(starts) == SHARDS
    line = original[starts[6] :].partition(b"\n")[0]
    for place in range(0, len(line), 7):
        notes.write_bytes(original)
        flip(notes, starts[6] + place)
        read, report = read_from_disk(store, monkeypatch, journal=notes)
        assert 6 in read, place
        assert set(read) <= {6, 7}  # a flipped end of a line joins two
        assert (report.damages, report.read_in_full) == ([], SHARDS)


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_torn_last_line_is_ignored_and_the_next_one_is_not_lost(
    store: Path, notes: Path, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    notes.write_bytes(notes.read_bytes()[:-cut])
    interrupted(store, notes, monkeypatch)  # notes shard 9 anew, behind the torn line
    assert read_from_disk(store, monkeypatch, journal=notes)[0] == []


def test_damage_that_was_noted_is_looked_at_again(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repaired shard that was made again has the same record as before."""
    damage(store, 5)
    notes = interrupted(store, tmp_path / "notes", monkeypatch)
    assert read_from_disk(store, monkeypatch, journal=notes)[1].damaged_shards == [5]
    interrupted(store, notes, monkeypatch)
    damage(store, 5)  # the same bit once more: as it was
    read, report = read_from_disk(store, monkeypatch, journal=notes)
    assert (read, report.damages) == ([5], [])


def test_a_journal_of_another_verification_is_refused(
    store: Path, notes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = notes.read_bytes()
    copy = write(tmp_path / "copy")
    for wrong, settings, named in (
        (copy, {}, "store: expected"),
        (store, {"quick": True}, "quick: expected True, found False"),
        (store, {"sample": 0.5}, "sample: expected 0.5, found None"),
    ):
        with pytest.raises(InputError, match=named):
            verify_store(wrong, journal=notes, **settings)
    again = write(tmp_path / "other", SHARDS + 1)
    store.rename(tmp_path / "away")
    again.rename(store)
    with pytest.raises(InputError, match="manifest_hash: expected"):
        verify_store(store, journal=notes)
    assert notes.read_bytes() == held


def test_a_file_that_is_no_journal_is_refused_and_kept(store: Path, notes: Path) -> None:
    flip(notes, 5)
    for path in (notes, store / "manifest.json"):
        held = path.read_bytes()
        with pytest.raises(InputError, match="expected the journal of a verification, found another file or a damaged"):
            verify_store(store, journal=path)
        assert path.read_bytes() == held


def test_two_verifications_do_not_share_a_journal(store: Path, notes: Path) -> None:
    lock = take_lock(notes)
    assert lock is not None
    with pytest.raises(InputError, match="found another verify writing it"):
        verify_store(store, journal=notes)
    lock.release()


def test_other_shards_may_follow_in_one_journal(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = interrupted(store, tmp_path / "n", monkeypatch, shards=(0, 3))
    assert read_from_disk(store, monkeypatch, journal=notes, shards=(2, 5))[0] == [4, 5]


def test_an_index_that_broke_after_its_shard_was_noted_is_damage(store: Path, notes: Path) -> None:
    flip(store / "shards" / "00002" / "index.npy")
    report = verify_store(store, journal=notes, workers=1)
    assert report.from_journal == SHARDS
    assert report.damaged_shards == [2]


def test_nothing_is_written_into_the_store(store: Path, tmp_path: Path) -> None:
    """So a store that is read-only can be verified with a journal."""

    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in [store, *store.rglob("*")]}

    before = state()
    assert verify_store(store, journal=tmp_path / "elsewhere" / "j").complete
    assert state() == before


def test_a_prepared_dataset_takes_no_such_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": FORMAT}))
    for flags in (["--shards", "1"], ["--sample", "0.5"], ["--seed", "2"], ["--journal", str(tmp_path / "j")]):
        assert main(["verify", str(tmp_path), *flags]) == 2
        assert f"{flags[0]}: expected a store, found the prepared dataset" in capsys.readouterr().err


# --- interruptions


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("workers", [1, 2])
def test_an_interrupted_verification_says_so_in_one_line(
    store: Path, tmp_path: Path, sent: signal.Signals, code: int, workers: int
) -> None:
    """The signal goes to every process, as Ctrl-C on a terminal does."""
    watched, journal = WatchedChecks(tmp_path / "w"), tmp_path / "j"
    words = ["verify", store, "--workers", str(workers), "--journal", journal]
    with watched.start(*words, seconds=5.0) as process:
        wait_for(lambda: len(watched.noted.read_text().splitlines()) >= workers)
        started = children(process.pid)
        assert len(started) == (0 if workers == 1 else workers)
        for number in (*started, process.pid):
            os.kill(number, sent)
        out, err = process.communicate(timeout=4)  # no check is waited for
    assert (process.returncode, out) == (code, "")
    said = [line for line in err.splitlines() if "verify:" not in line or "draftcache" in line]
    assert len(said) == 1
    assert said[0].endswith("draftcache verify: interrupted; the same command goes on from what was saved")
    assert not any(Path(f"/proc/{number}").exists() for number in started)


def test_workers_that_have_just_started_say_nothing_when_interrupted(store: Path, tmp_path: Path) -> None:
    watched = WatchedChecks(tmp_path / "w")
    with watched.start("verify", store, "--workers", "2", seconds=5.0) as process:
        wait_for(lambda: children(process.pid))
        for number in (*children(process.pid), process.pid):
            os.kill(number, signal.SIGINT)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "interrupted; the same command starts from the beginning" in err


def test_a_worker_that_is_killed_is_named(store: Path, tmp_path: Path) -> None:
    watched = WatchedChecks(tmp_path / "w")
    with watched.start("verify", store, "--workers", "2", seconds=2.0) as process:
        wait_for(lambda: len(watched.noted.read_text().splitlines()) >= 2)
        os.kill(children(process.pid)[0], signal.SIGKILL)
        _, err = process.communicate(timeout=20)
    assert process.returncode == WorkerError.exit_code
    assert "a worker process died (killed, or out of memory); nothing was changed. Try fewer --workers" in err
