"""The figures in a prepared dataset's manifest: against loops over its rows, and for any number of workers."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from draftcache.capture.prepare import chunks as prepare_chunks
from draftcache.capture.prepare.draft_vocabulary import build_vocab_map, coverage_curve, coverage_of, coverage_table
from draftcache.capture.prepare.duplicates import DuplicateTable
from draftcache.capture.prepare.job import PrepareConfig, PrepareResult, prepare
from draftcache.capture.prepare.rows.rejections import Rejection
from draftcache.capture.prepare.statistics import SplitStatistics, loss_runs
from draftcache.capture.prepare.token_dataset import TokenDataset
from draftcache.store.common.errors import InputError
from draftcache.store.common.length_counts import LengthCounts
from draftcache.store.common.sealed_json import seal


def row(*ids: int, mask: list[int] | None = None) -> dict[str, Any]:
    return {"token_ids": list(ids), "loss_mask": mask or [0] + [1] * (len(ids) - 1)}


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in rows))
    return path


def run(tokenizer: Path, output: Path, **settings: Any) -> PrepareResult:
    settings = {"held_out": {}, "workers": 1, "progress": False, **settings}
    return prepare(PrepareConfig(tokenizer=tokenizer, output=output, **settings))


def runs_by_loop(mask: list[bool], lengths: list[int]) -> list[tuple[int, int]]:
    found, at = [], 0
    for length in lengths:
        start = None
        for position in range(at, at + length):
            if mask[position] and start is None:
                start = position
            if not mask[position] and start is not None:
                found.append((start, position))
                start = None
        if start is not None:
            found.append((start, at + length))
        at += length
    return found


def test_loss_runs_are_those_of_a_loop_and_end_with_their_conversation() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        lengths = rng.integers(1, 7, rng.integers(0, 6))
        mask = rng.random(int(lengths.sum())) < rng.choice([0.2, 0.5, 0.9, 1.0])
        starts, ends = loss_runs(mask, lengths)
        expected = runs_by_loop(mask.tolist(), lengths.tolist())
        assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == expected
    starts, ends = loss_runs(np.ones(5, np.bool_), np.array([2, 3]))
    assert (starts.tolist(), ends.tolist()) == ([0, 2], [2, 5])


def test_length_counts_are_numpys_figures_whatever_the_pieces() -> None:
    rng = np.random.default_rng(1)
    for count in (1, 2, 3, 10, 999):
        lengths = rng.lognormal(4, 1.5, count).astype(np.int64)
        whole, pieces = LengthCounts(lengths), LengthCounts()
        for piece in np.array_split(lengths, 4):
            pieces.add(piece)
        found = whole.as_json()
        assert found == pieces.as_json()
        assert (found["count"], found["min"], found["max"]) == (count, lengths.min(), lengths.max())
        assert found["mean"] == pytest.approx(lengths.mean())
        assert [found["p50"], found["p90"]] == pytest.approx(np.quantile(lengths, [0.5, 0.9]).tolist())
        for item in found["bins"]:
            inside = (np.maximum(lengths, 1) >= item["from"]) & (np.maximum(lengths, 1) < item["to"])
            assert item["count"] == inside.sum()
        assert sum(item["count"] for item in found["bins"]) == count
        assert [item["from"] for item in found["bins"][1:]] == [item["to"] for item in found["bins"][:-1]]
    assert LengthCounts().as_json() == {"count": 0, "bins": []}


def test_a_reason_has_its_first_row_as_example_and_its_share_of_all_rows() -> None:
    statistics = SplitStatistics()
    for line, reason in ((3, "b"), (5, "a"), (9, "b")):
        statistics.reject(Rejection(file="f.jsonl", line=line, reason=reason, expected="text", found=f"\ud800 {line}"))
    found = statistics.record(8)["quarantine"]
    assert found == {
        "a": {
            "rows": 1,
            "fraction": 1 / 8,
            "example": {"file": "f.jsonl", "line": 5, "expected": "text", "found": r"\ud800 5"},
        },
        "b": {
            "rows": 2,
            "fraction": 2 / 8,
            "example": {"file": "f.jsonl", "line": 3, "expected": "text", "found": r"\ud800 3"},
        },
    }
    seal(found)  # a lone surrogate in it could not be written


def random_splits(tmp_path: Path) -> dict[str, Path]:
    """Three files of short rows of token ids, which repeat within and across them, with bad rows among them."""
    choose = random.Random(5)
    pool = [row(*choose.choices(range(400), k=choose.randrange(2, 12))) for _ in range(60)]
    files = {}
    for name, count in (("one", 70), ("two", 50), ("dev", 40)):
        rows = [choose.choice(pool) for _ in range(count)]
        rows[7] = "broken"
        files[name] = write_rows(tmp_path / f"{name}.jsonl", rows)
    return files


@pytest.mark.parametrize("drop", [False, True])
def test_manifest_figures_are_exact_for_any_number_of_workers(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drop: bool
) -> None:
    monkeypatch.setattr(prepare_chunks, "CHUNK_BYTES", 500)
    files = random_splits(tmp_path)
    splits, held_out = {name: [files[name]] for name in ("one", "two")}, {"dev": [files["dev"]]}
    manifests = [
        run(
            tokenizer_dir, tmp_path / str(workers), splits=splits, held_out=held_out, workers=workers,
            drop_duplicates=drop, max_length=10,
        ).manifest
        for workers in (1, 3)
    ]  # fmt: skip
    assert manifests[0] == manifests[1]
    manifest, seen = manifests[0], dict[str, list[bytes]]()
    shared, dropped, repeated = Counter[tuple[str, str]](), Counter[tuple[str, str]](), Counter[str]()
    for name, path in files.items():
        seen[name] = []
        rows = [json.loads(line) for line in path.read_text().splitlines() if line != "broken"]
        lengths, answers = [], []
        for item in rows:
            content = json.dumps([item["token_ids"][:10], item["loss_mask"][:10]]).encode()
            having = [other for other in seen if content in seen[other]]
            if drop and having:
                dropped[having[0], name] += 1
                continue
            repeated[name] += name in having
            shared.update((other, name) for other in having if other != name)
            seen[name].append(content)
            lengths.append(min(len(item["token_ids"]), 10))
            answers.append(lengths[-1] - 1)
        record = manifest["splits"][name]
        assert record["rows"] == len(lengths)
        assert record["read_rows"] == len(rows) + 1
        assert record["duplicate_rows"] == repeated[name]
        assert record["dropped_duplicates"] == {
            origin: rows for (origin, other), rows in dropped.items() if other == name
        }
        assert record["lengths"] == LengthCounts(lengths).as_json()
        assert record["answer_lengths"] == LengthCounts(answers).as_json()
        assert record["quarantine"]["malformed-json"]["fraction"] == 1 / (len(rows) + 1)
        split = TokenDataset.open(tmp_path / "3").split(name)
        assert [json.dumps([ids.tolist(), mask.astype(int).tolist()]).encode() for ids, mask, _ in split] == seen[name]
        assert record["loss_tokens"] == int(split.token_counts.sum()) == int(split.loss_mask.sum())
    assert manifest["drop_duplicates"] is drop
    found = {tuple(pair["splits"]): pair["rows"] for pair in manifest["shared_rows"]}
    assert found == dict(shared)
    if drop:
        assert not found
        assert dropped["one", "dev"] > 0 < dropped["one", "one"]
    else:
        assert found.keys() == {("one", "two"), ("one", "dev"), ("two", "dev")}
        assert repeated["one"] > 0


def test_a_row_is_shared_with_each_earlier_split_that_has_it_and_counts_each_time() -> None:
    table = DuplicateTable()
    assert table.keep("a", [b"x", b"y", b"x"]).tolist() == [True] * 3
    assert table.keep("b", [b"x"]).tolist() == [True]
    assert table.keep("c", [b"x", b"x", b"z"]).tolist() == [True] * 3
    pairs = {tuple(pair["splits"]): pair["rows"] for pair in table.shared_rows()}
    assert pairs == {("a", "b"): 1, ("a", "c"): 2, ("b", "c"): 2}
    assert [table.repeated_rows(name) for name in "abc"] == [1, 0, 1]


def test_a_split_that_dropping_leaves_empty_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "a.jsonl", [row(1, 2), row(3, 4)])
    dev = write_rows(tmp_path / "d.jsonl", [row(3, 4), row(3, 4), "broken"])
    inputs = {"splits": {"train": [train]}, "held_out": {"dev": [dev]}}
    with pytest.raises(InputError, match=r"split dev: .*--drop-duplicates drops all .* of: \{'train': 2\}"):
        run(tokenizer_dir, tmp_path / "out", drop_duplicates=True, **inputs)
    assert not (tmp_path / "out").exists()
    manifest = run(tokenizer_dir, tmp_path / "out", **inputs).manifest  # negative control
    assert manifest["shared_rows"] == [{"splits": ["train", "dev"], "rows": 2}]


def test_dropping_duplicates_makes_another_job(tokenizer_dir: Path, tmp_path: Path) -> None:
    inputs = {"splits": {"train": [write_rows(tmp_path / "a.jsonl", [row(1, 2), row(1, 2)])]}}
    assert run(tokenizer_dir, tmp_path / "out", **inputs).manifest["splits"]["train"]["rows"] == 2
    assert run(tokenizer_dir, tmp_path / "out", **inputs).reused
    with pytest.raises(InputError, match="other inputs or settings"):
        run(tokenizer_dir, tmp_path / "out", drop_duplicates=True, **inputs)
    again = run(tokenizer_dir, tmp_path / "out", drop_duplicates=True, overwrite=True, **inputs)
    assert again.manifest["splits"]["train"]["rows"] == 1


def test_the_curve_is_the_coverage_of_the_map_of_each_size() -> None:
    rng = np.random.default_rng(2)
    counts = {name: rng.poisson(rng.lognormal(0, 2, 3000)).astype(np.int64) for name in ("a", "b")}
    held_out = {"dev": rng.poisson(1, 3000).astype(np.int64), "none": np.zeros(3000, np.int64)}
    curve = coverage_curve(counts, held_out, sizes=(5, 1024, 3000, 3001))
    assert [entry["name"] for entry in curve] == ["a", "b", "union", "dev", "none"]
    for number, size in enumerate((5, 1024, 3000)):
        vocab_map = build_vocab_map(counts, size)
        for entry, expected in zip(curve, coverage_table(counts, vocab_map, held_out), strict=True):
            assert entry["points"][number] == {
                "size": size, "covered_tokens": expected.covered_tokens, "fraction": expected.fraction,
            }  # fmt: skip
            assert entry["loss_tokens"] == expected.loss_tokens
    assert all(len(entry["points"]) == 3 for entry in curve)  # no map has more ids than there are
    assert coverage_of("dev", held_out["dev"], build_vocab_map(counts, 5)).fraction < 0.5
    assert [point["size"] for point in coverage_curve(counts)[0]["points"]] == [1024, 2048]


def test_the_dataset_holds_the_tokenizer_that_made_it(tokenizer_dir: Path, tmp_path: Path) -> None:
    inputs = {"splits": {"train": [write_rows(tmp_path / "a.jsonl", [row(1, 2)])]}}
    run(tokenizer_dir, tmp_path / "out", **inputs)
    dataset = TokenDataset.open(tmp_path / "out")
    assert dataset.has_tokenizer
    held, given = (Tokenizer.from_file(str(path / "tokenizer.json")) for path in (dataset.path, tokenizer_dir))
    text = "The quick 東京 🎉<|im_end|>"
    assert held.encode(text).ids == given.encode(text).ids
    data = (dataset.path / "tokenizer.json").read_bytes()
    (dataset.path / "tokenizer.json").write_bytes(data[:-1] + b" ")
    with pytest.raises(InputError, match=r"tokenizer\.json: expected xxh3-128"):
        TokenDataset.open(tmp_path / "out")
