"""Verification of big stores: of chosen shards, of a sample; what reports say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from draftcache.store.common.errors import InputError
from draftcache.store.common.files import hash_file
from draftcache.store.common.sealed_json import seal, unseal
from draftcache.store.shard_choice import ShardChoice
from draftcache.store.verify import verify_store
from draftcache.tools.cli import main
from draftcache.tools.commands.verify import parse_shards
from support.verified_stores import SHARDS, damage, flip, read_from_disk, write


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write(tmp_path / "s")


# --- chosen shards


def test_only_the_chosen_shards_are_read_and_judged(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damage(store, 2)
    damage(store, 6)
    (store / "shards" / "00007" / "stray").write_text("x")
    (store / "shards" / "00004" / "stray").write_text("x")
    read, report = read_from_disk(store, monkeypatch, shards=(3, 6))
    assert read == [3, 4, 5, 6]
    assert report.damaged_shards == [6]
    assert report.strays == ["shards/00004/stray"]
    assert (report.read_in_full, report.checked_by_size, report.not_looked_at) == (4, 0, 6)
    assert (report.committed, report.conversations, report.complete) == (SHARDS, 8, False)
    assert verify_store(store).damaged_shards == [2, 6]


def test_the_files_beside_the_shards_are_checked_always(store: Path) -> None:
    flip(store / "frozen.safetensors")
    (store / "commit" / "00009.json").unlink()
    report = verify_store(store, shards=(0, 0))
    assert {item.name for item in report.damages} == {"frozen.safetensors", "commit/00009.json"}


def test_rows_of_the_index_are_compared_for_the_chosen_shards(store: Path) -> None:
    """An index whose hash fits its record, with one wrong row: found where the row's shard is looked at."""
    row_bytes = (store / "index.npy").stat().st_size // (2 * SHARDS)
    flip(store / "index.npy", -row_bytes - 1)  # in a row of the last shard
    record = unseal((store / "commit" / "index.json").read_bytes(), "")
    record["files"]["index.npy"]["xxh3_128"] = hash_file(store / "index.npy")
    (store / "commit" / "index.json").write_bytes(seal(record))
    (found,) = verify_store(store, shards=(9, 9)).damages
    assert (found.name, found.problem[:17]) == ("index.npy", "expected the rows")
    assert verify_store(store, shards=(0, 8)).damages == []
    assert verify_store(store).damages == [found]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"shards": (3, 10)}, r"--shards: expected numbers from 0 to 9, as the store has 10 shards, found 3-10"),
        ({"shards": (5, 4)}, r"--shards: expected numbers A-B with 0 <= A <= B, found 5-4"),
        ({"sample": 0.0}, r"--sample: expected a share above 0 and at most 1, found 0.0"),
        ({"sample": 1.5}, r"--sample: expected a share above 0 and at most 1, found 1.5"),
        ({"sample": 0.5, "quick": True}, r"--sample: expected it without --quick, found both"),
        ({"sample": 0.5, "seed": -1}, r"--seed: expected a number of at least 0, found -1"),
        ({"seed": 3}, r"--seed: expected --sample beside it, found --seed 3 alone"),
    ],
)
def test_settings_that_do_not_fit_are_refused(store: Path, settings: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        verify_store(store, **settings)


def test_flags_that_do_not_fit_end_with_2(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(store), "--shards", "10"]) == 2
    assert "--shards: expected numbers from 0 to 9" in capsys.readouterr().err
    for text in ("a", "1-", "-3", "1-2-3", ""):
        with pytest.raises(InputError, match="--shards: expected A-B or A"):
            parse_shards(text)
    assert (parse_shards("3"), parse_shards("3-17")) == ((3, 3), (3, 17))


# --- samples


def test_a_sample_reads_a_share_and_sizes_of_the_others(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, report = read_from_disk(store, monkeypatch, sample=0.3)
    assert len(read) == 3
    assert read_from_disk(store, monkeypatch, sample=0.3)[0] == read
    assert (report.read_in_full, report.checked_by_size, report.not_looked_at) == (3, 7, 0)
    inside, outside = read[0], next(number for number in range(SHARDS) if number not in read)
    damage(store, outside)
    assert verify_store(store, sample=0.3).damages == []  # it can't know, and does not say so
    damage(store, inside)
    assert verify_store(store, sample=0.3).damaged_shards == [inside]
    (store / "shards" / f"{outside:05d}" / "token_ids" / "c.0").write_bytes(b"")
    assert verify_store(store, sample=0.3).damaged_shards == sorted([inside, outside])


def test_seeds_read_other_shards_and_all_of_them_between_them(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_seed = [set(read_from_disk(store, monkeypatch, sample=0.2, seed=seed)[0]) for seed in range(5)]
    assert [len(read) for read in by_seed] == [2] * 5
    assert set().union(*by_seed) == set(range(SHARDS))
    assert read_from_disk(store, monkeypatch, sample=0.2, seed=5)[0] == sorted(by_seed[0])
    assert read_from_disk(store, monkeypatch, sample=1.0, seed=1)[0] == list(range(SHARDS))


def test_a_sample_depends_on_the_manifest_and_is_rounded_up() -> None:
    hundred = list(range(100))
    choice = ShardChoice(sample=0.07)
    assert len(choice.in_full(hundred, "a")) == 7
    assert len(ShardChoice(sample=0.001).in_full(hundred, "a")) == 1
    assert choice.in_full(hundred, "a") != choice.in_full(hundred, "b")
    assert ShardChoice(sample=0.5).in_full([], "a") == set()


def test_a_sample_is_taken_of_the_chosen_shards(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, report = read_from_disk(store, monkeypatch, shards=(0, 3), sample=0.5)
    assert len(read) == 2
    assert max(read) < 4
    assert (report.read_in_full, report.checked_by_size, report.not_looked_at) == (2, 2, 6)


# --- what is said


@pytest.mark.parametrize(
    ("flags", "counts", "whole"),
    [
        ([], (10, 0, 0), True),
        (["--quick"], (0, 10, 0), False),
        (["--shards", "2-4"], (3, 0, 7), False),
        (["--shards", "2-4", "--quick"], (0, 3, 7), False),
        (["--sample", "0.2", "--seed", "1"], (2, 8, 0), False),
    ],
)
def test_reports_say_what_was_looked_at(
    store: Path, capsys: pytest.CaptureFixture[str], flags: list[str], counts: tuple[int, int, int], whole: bool
) -> None:
    assert main(["verify", str(store), *flags]) == 0
    text = capsys.readouterr().out
    full, by_size, unseen = counts
    assert f"{full} shards read in full, {by_size} by record and file sizes only, {unseen} not looked at" in text
    assert ("Nothing is known of the content of shards that were not read in full" in text) == (not whole)
    assert ("sample: --seed 1; the n shards to check are put in the order" in text) == ("--sample" in flags)
    assert main(["verify", str(store), *flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert tuple(found[name] for name in ("read_in_full", "checked_by_size", "not_looked_at")) == counts
    assert (found["complete"], found["unreadable"]) == (whole, 0)


def test_a_shard_without_a_readable_record_counts_as_not_checked(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(store / "commit" / "00003.json", 40)
    report = verify_store(store)
    assert (report.read_in_full, report.unreadable, report.complete) == (SHARDS - 1, 1, False)
    assert main(["verify", str(store)]) == 1
    assert "not checked: the files of 1 shards, as their commit records can't be read" in capsys.readouterr().out


@pytest.mark.parametrize("settings", [{}, {"quick": True}, {"shards": (1, 3)}, {"sample": 0.4}])
def test_progress_has_a_total_that_is_reached(store: Path, settings: dict[str, Any]) -> None:
    planned: list[tuple[int, int]] = []
    done: list[int] = []
    verify_store(store, workers=1, planned=lambda *sizes: planned.append(sizes), progress=done.append, **settings)
    ((total, before),) = planned
    assert sum(done) == total > 0
    assert before == 0
    records = {n: unseal((store / "commit" / f"{n:05d}.json").read_bytes(), "") for n in range(SHARDS)}
    sizes = {n: sum(file["bytes"] for file in record["files"].values()) for n, record in records.items()}
    if not settings or settings.get("quick"):
        assert total == sum(sizes.values())
    if "shards" in settings:
        assert total == sizes[1] + sizes[2] + sizes[3]
    if "sample" in settings:
        assert total == sum(sizes[n] for n in ShardChoice(sample=0.4).in_full(range(SHARDS), manifest_hash(records)))


def manifest_hash(records: dict[int, Any]) -> str:
    (found,) = {record["manifest_hash"] for record in records.values()}
    return str(found)


@pytest.mark.parametrize("command", ["verify", "repair"])
def test_the_bar_of_a_command_shows_a_percentage(store: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, str(store)]) == 0
    shown = capsys.readouterr().err
    assert re.search(r"verify:   0%.*0\.00/[1-9].*B", shown)
    assert "verify: 100%" in shown


def test_convert_counts_the_tokens_of_all_shards(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # shards that are there already count too
        assert main(["convert", str(store), str(tmp_path / "t")]) == 0
        assert "convert: 100%|" in capsys.readouterr().err
