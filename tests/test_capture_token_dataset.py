from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draftcache.capture.prepare.rows.rejections import Rejection
from draftcache.capture.prepare.token_dataset import CONVERSATION_DTYPE, TokenDataset, conversation_hash, find_damages
from draftcache.capture.prepare.token_dataset_writer import DatasetWriter
from draftcache.store.common.attempts import attempt_path
from draftcache.store.common.errors import InputError
from draftcache.store.common.files import hash_bytes, hash_file
from draftcache.store.common.sealed_json import seal, unseal
from draftcache.tools.cli import main

VOCAB = 50
ROWS = [
    (np.array([1, 2, 3, 3], np.uint32), np.array([0, 1, 1, 1], np.bool_)),
    (np.array([7], np.uint32), np.array([1], np.bool_)),
    (np.array([1, 2, 3, 3], np.uint32), np.array([0, 1, 1, 1], np.bool_)),
    (np.array([49, 3], np.uint32), np.array([1, 0], np.bool_)),
]
BAD = Rejection(file="f.jsonl", line=5, reason="malformed-json", expected="one JSON object", found="{\ud800")


def packed(rows: list[tuple[np.ndarray, np.ndarray]], line: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    records = [
        (np.void(conversation_hash(ids, mask)), 0, len(ids), len(ids) + number, mask.sum(), line + number, 0)
        for number, (ids, mask) in enumerate(rows)
    ]
    ids, mask = (np.concatenate(column) for column in zip(*rows, strict=True))
    return ids, mask, np.array(records, CONVERSATION_DTYPE)


def write(output: Path, *, overwrite: bool = False, vocab: int = VOCAB) -> dict[str, Any]:
    with DatasetWriter(output, overwrite=overwrite) as dataset:
        split = dataset.open_splits(["train"], vocab)["train"]
        split.append(*packed(ROWS[:2], 1))
        split.append(*packed(ROWS[2:], 3))
        split.reject(BAD)
        split.close()
        manifest = {
            "vocab_size": vocab,
            "tokenizer": {"hash": "t"},
            "chat_template": {"hash": "c"},
            "splits": {"train": {"held_out": False, **split.record()}},
        }
        return dataset.commit(manifest)


def test_rows_come_back(tmp_path: Path) -> None:
    write(tmp_path / "out")
    dataset = TokenDataset.open(tmp_path / "out")
    dataset.verify()
    assert (dataset.splits, dataset.held_out, dataset.vocab_size) == (("train",), (), VOCAB)
    assert (dataset.tokenizer_hash, dataset.chat_template_hash) == ("t", "c")
    split = dataset.split("train")
    assert len(split) == 4
    for index, (ids, mask) in enumerate(ROWS):
        found_ids, found_mask, content_hash = split[index]
        assert (found_ids.dtype, found_mask.dtype) == (np.uint32, np.bool_)
        assert found_ids.tolist() == ids.tolist()
        assert found_mask.tolist() == mask.tolist()
        assert content_hash == hash_bytes(ids.tobytes(), mask.tobytes())
    assert split[-1][0].tolist() == [49, 3]
    with pytest.raises(IndexError):
        split[4]
    assert isinstance(split.token_ids, np.memmap)
    assert split.conversations["first_token"].tolist() == [0, 4, 5, 9]
    assert split.conversations["source_line"].tolist() == [1, 2, 3, 4]
    counts = np.bincount([2, 3, 3, 7, 2, 3, 3, 49], minlength=VOCAB)
    assert split.token_counts.tolist() == counts.tolist()


def test_accounting_and_quarantine(tmp_path: Path) -> None:
    record = write(tmp_path / "out")["splits"]["train"]
    assert {key: record[key] for key in ("rows", "tokens", "untruncated_tokens", "truncated_rows")} == {
        "rows": 4,
        "tokens": 11,
        "untruncated_tokens": 13,
        "truncated_rows": 2,
    }
    assert (record["loss_tokens"], record["unique_loss_ids"], record["duplicate_rows"]) == (8, 4, 1)
    assert (record["truncation_loss_tokens"], record["loss_fraction"]) == (2, 8 / 11)
    assert (record["quarantined_rows"], record["quarantined_by_reason"]) == (1, {"malformed-json": 1})
    lines = (tmp_path / "out" / "train" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [BAD.as_json()]


def test_content_hash_follows_the_content(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    first, second = (TokenDataset.open(tmp_path / name) for name in "ab")
    assert first.content_hash() == second.content_hash() == first.content_hash(("train",))
    write(tmp_path / "b", overwrite=True, vocab=VOCAB + 1)
    assert TokenDataset.open(tmp_path / "b").content_hash() != first.content_hash()


def test_unfinished_foreign_and_newer_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"found no manifest\.json"):
        TokenDataset.open(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_text('{"format": "something"}')
    with pytest.raises(InputError, match="found another file"):
        TokenDataset.open(tmp_path)
    path.write_text('{"format": "draftcache-prepared", "version": 3}')
    with pytest.raises(InputError, match="expected layout version 2, found 3"):
        TokenDataset.open(tmp_path)
    path.write_text("{")
    with pytest.raises(InputError, match="expected JSON"):
        TokenDataset.open(tmp_path)


def test_cut_and_missing_files_are_found_on_open(tmp_path: Path) -> None:
    write(tmp_path / "out")
    path = tmp_path / "out" / "train" / "token_ids.npy"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(InputError, match=rf"token_ids\.npy: expected {len(data)} bytes, found {len(data) - 1} bytes"):
        TokenDataset.open(tmp_path / "out")
    path.unlink()
    with pytest.raises(InputError, match=r"token_ids\.npy: expected \d+ bytes, found nothing there"):
        TokenDataset.open(tmp_path / "out")


def test_a_flipped_byte_is_found_by_verify(tmp_path: Path) -> None:
    write(tmp_path / "out")
    path = tmp_path / "out" / "train" / "loss_mask.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"loss_mask\.npy: expected xxh3-128"):
        TokenDataset.open(tmp_path / "out").verify()


def swap(path: Path, array: np.ndarray, *, allow_pickle: bool = False) -> None:
    """Replace an array and make the manifest agree, so that only the reader's own checks are left."""
    np.save(path, array, allow_pickle=allow_pickle)
    manifest_path = path.parent.parent / "manifest.json"
    manifest = unseal(manifest_path.read_bytes(), "")
    manifest["files"][f"train/{path.name}"] = {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)}
    manifest_path.write_bytes(seal(manifest))


@pytest.mark.parametrize(
    ("name", "array", "found"),
    [
        ("token_ids", np.arange(11), "expected uint32"),
        ("token_ids", np.zeros((1, 11), np.uint32), "expected uint32"),
        ("token_ids", np.zeros(10, np.uint32), "expected 11 values, found 10"),
        ("loss_mask", np.zeros(12, np.bool_), "expected 11 values, found 12"),
        ("token_counts", np.zeros(VOCAB + 1, np.int64), f"expected {VOCAB} values"),
        ("token_ids", np.array([print] * 11, object), "expected a .npy array"),
    ],
)
def test_wrong_arrays_are_refused(tmp_path: Path, name: str, array: np.ndarray, found: str) -> None:
    write(tmp_path / "out")
    swap(tmp_path / "out" / "train" / f"{name}.npy", array, allow_pickle=array.dtype == object)
    with pytest.raises(InputError, match=found) as caught:
        TokenDataset.open(tmp_path / "out").split("train")
    assert f"{name}.npy" in str(caught.value)


def test_no_changed_byte_of_a_dataset_is_used(tmp_path: Path) -> None:
    """Every byte of every file is changed in turn: opening or reading refuses it, and verify names the file.

    Exempt are the headers of the two arrays that are read conversation by conversation: only verify sees a change there
    that leaves their shape and dtype as they were.
    """
    write(tmp_path / "out")
    read_all(tmp_path / "out")  # negative control
    assert find_damages(tmp_path / "out") == []
    for path in sorted(tmp_path.rglob("*")):
        if path.is_dir():
            continue
        data = path.read_bytes()
        name = path.relative_to(tmp_path / "out").as_posix()
        by_conversation = path.name in ("token_ids.npy", "loss_mask.npy")
        for at in range(128 if by_conversation else 0, len(data)):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            with pytest.raises(InputError, match=str(tmp_path / "out")):
                read_all(tmp_path / "out")
            if name == "manifest.json":
                continue
            (damage,) = find_damages(tmp_path / "out")
            assert damage.name == name
            assert len(damage.conversations) == by_conversation
        path.write_bytes(data)


def read_all(path: Path) -> None:
    dataset = TokenDataset.open(path)
    for name in dataset.splits:
        split = dataset.split(name)
        for number in range(len(split)):
            split[number]


def test_a_dataset_of_the_first_version_opens_without_a_seal(tmp_path: Path) -> None:
    write(tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    manifest = unseal(path.read_bytes(), "")
    path.write_text(json.dumps(manifest | {"version": 1}))
    read_all(tmp_path / "out")
    path.write_bytes(seal(manifest | {"version": 1}))  # never written so: a changed version must not remove the seal
    with pytest.raises(InputError, match="expected layout version 2, found 1"):
        TokenDataset.open(tmp_path / "out")


def test_the_verify_command_names_files_and_conversations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "out")
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert "all files as they were written" in capsys.readouterr().out
    path = tmp_path / "out" / "train" / "loss_mask.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    last = len(TokenDataset.open(tmp_path / "out").split("train")) - 1
    assert main(["verify", str(tmp_path / "out")]) == 1
    output = capsys.readouterr().out
    assert "DAMAGED train/loss_mask.npy: expected xxh3-128" in output
    assert f"touches train[{last}]" in output
    assert main(["verify", "--json", str(tmp_path / "out")]) == 1
    assert json.loads(capsys.readouterr().out)["damages"][0]["conversations"] == [last]


def test_unknown_split(tmp_path: Path) -> None:
    write(tmp_path / "out")
    with pytest.raises(InputError, match=r"among \['train'\], found 'dev'"):
        TokenDataset.open(tmp_path / "out").split("dev")


def test_only_datasets_are_replaced_and_only_on_request(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="no prepared dataset"):
            write(output, overwrite=overwrite)
    assert (output / "precious.txt").read_text() == "mine"
    shutil.rmtree(output)
    output.mkdir()  # empty: may be used
    first = write(output)
    with pytest.raises(InputError, match="--overwrite"):
        write(output, vocab=60)
    assert TokenDataset.open(output).manifest == first
    write(output, overwrite=True, vocab=60)
    assert TokenDataset.open(output).vocab_size == 60
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_an_error_leaves_nothing_and_a_killed_runs_leftovers_go(tmp_path: Path) -> None:
    output = tmp_path / "out"

    def fail() -> None:
        with DatasetWriter(output) as dataset:
            dataset.open_splits(["train"], VOCAB)
            raise InputError("no")

    with pytest.raises(InputError, match="no"):
        fail()
    assert list(tmp_path.iterdir()) == []
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    leftover = attempt_path(output)
    leftover = leftover.with_name(leftover.name.replace(f"-{os.getpid()}-", f"-{ended.pid}-"))
    (leftover / "old").mkdir(parents=True)
    (leftover / "old" / "token_ids.npy").write_bytes(b"half")
    write(output)
    TokenDataset.open(output).verify()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_writers_at_once_are_refused(tmp_path: Path) -> None:
    with DatasetWriter(tmp_path / "out") as first:
        with pytest.raises(InputError, match="another prepare at work"), DatasetWriter(tmp_path / "out"):
            pass
        assert first.partial.is_dir()  # the loser took nothing away


def test_two_writers_without_locks_leave_the_dataset_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    output = tmp_path / "out"
    with DatasetWriter(output) as late:
        late.open_splits(["late"], VOCAB)["late"].close()
        write(output)
        first = hash_file(output / "manifest.json")
        with pytest.raises(InputError, match="another prepare has just finished"):
            late.commit({"splits": {}})
    assert hash_file(output / "manifest.json") == first
    TokenDataset.open(output).verify()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("again", [False, True])
def test_a_dataset_finished_meanwhile_is_not_written_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    output = tmp_path / "out"
    lock = fcntl.flock

    def finish_first(descriptor: int, operation: int) -> None:
        output.mkdir()
        (output / "theirs").touch()
        (tmp_path / ".out.lock").unlink()
        if again:  # a third run has started meanwhile
            (tmp_path / ".out.lock").touch()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", finish_first)
    with pytest.raises(InputError, match="just finished"), DatasetWriter(output):
        pass
    assert [path.name for path in output.iterdir()] == ["theirs"]
    assert (tmp_path / ".out.lock").exists() == again  # the third run's lock is left alone
