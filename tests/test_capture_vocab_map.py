from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from draftcache.capture.prepare.draft_vocabulary import build_vocab_map, coverage_table
from draftcache.store.common.errors import InputError
from draftcache.store.common.files import hash_bytes
from draftcache.store.format.vocab_map import VocabMap

#                ids:  0  1  2  3  4  5  6  7
STAGE_1 = np.array([0, 5, 0, 2, 2, 0, 9, 0], np.int64)
STAGE_2 = np.array([0, 0, 0, 0, 0, 4, 1, 0], np.int64)


def test_most_frequent_of_the_union_with_ties_by_id() -> None:
    # union: 6 -> 10, 1 -> 5, 5 -> 4, then 3 and 4 tie at 2
    vocab_map = build_vocab_map({"a": STAGE_1, "b": STAGE_2}, 4)
    assert vocab_map.target_ids.tolist() == [1, 3, 5, 6]
    assert vocab_map.d2t.tolist() == [1, 2, 3, 3]
    assert vocab_map.d2t.dtype == np.int64
    assert (np.arange(4) + vocab_map.d2t).tolist() == [1, 3, 5, 6]
    assert np.flatnonzero(vocab_map.t2d).tolist() == [1, 3, 5, 6]
    lookup = vocab_map.target_to_draft()
    assert lookup.dtype == np.int32
    assert lookup.tolist() == [-1, 0, -1, 1, -1, 2, 3, -1]
    assert vocab_map.sources == ("a", "b")


def test_unseen_ids_fill_the_map_from_the_lowest() -> None:
    assert build_vocab_map({"a": STAGE_1}, 6).target_ids.tolist() == [0, 1, 2, 3, 4, 6]
    assert len(build_vocab_map({"a": STAGE_1}, 8)) == 8


def test_ties_across_a_large_vocabulary_follow_the_definition() -> None:
    counts = np.random.default_rng(3).integers(0, 50, 20_000)
    expected = sorted(sorted(range(20_000), key=lambda i: (-counts[i], i))[:5000])
    assert build_vocab_map({"a": counts}, 5000).target_ids.tolist() == expected


@pytest.mark.parametrize("size", [0, -1, 9])
def test_sizes_out_of_range_are_refused(size: int) -> None:
    with pytest.raises(InputError, match=rf"expected 1\.\.8 .* found {size}"):
        build_vocab_map({"a": STAGE_1}, size)


def test_different_vocabularies_and_no_inputs_are_refused() -> None:
    with pytest.raises(InputError, match="'b': 7"):
        build_vocab_map({"a": STAGE_1, "b": STAGE_2[:7]}, 3)
    with pytest.raises(InputError, match="at least one input"):
        build_vocab_map({}, 3)


def test_coverage_per_input_union_and_held_out() -> None:
    vocab_map = build_vocab_map({"a": STAGE_1, "b": STAGE_2}, 3)  # 1, 5, 6
    held_out = np.array([3, 1, 0, 0, 0, 0, 0, 0], np.int64)
    rows = coverage_table({"a": STAGE_1, "b": STAGE_2}, vocab_map, {"dev": held_out})
    table = {row.name: (row.loss_tokens, row.unique_ids, row.covered_tokens, row.covered_ids) for row in rows}
    assert table == {"a": (18, 4, 14, 2), "b": (5, 2, 5, 2), "union": (23, 5, 19, 3), "dev": (4, 2, 1, 1)}
    assert (rows[0].lost_tokens, rows[0].fraction) == (4, 14 / 18)
    assert rows[3].as_json()["lost_tokens"] == 3


def test_hash_is_over_ids_and_vocabulary_size() -> None:
    vocab_map = build_vocab_map({"a": STAGE_1}, 3)
    assert vocab_map.hash == hash_bytes(np.array([1, 3, 6, 8], "<i8").tobytes())
    same = build_vocab_map({"other name": STAGE_1 * 7}, 3)
    assert same.hash == vocab_map.hash
    padded = VocabMap(target_ids=vocab_map.target_ids, vocab_size=9)
    assert padded.hash != vocab_map.hash


def test_save_and_load(tmp_path: Path) -> None:
    vocab_map = build_vocab_map({"a": STAGE_1, "b": STAGE_2}, 4)
    path = tmp_path / "vocab_map.safetensors"
    vocab_map.save(path)
    tensors = load_file(path)
    assert (tensors["d2t"].dtype, tensors["t2d"].dtype, tensors["t2d"].shape) == (np.int64, np.bool_, (8,))
    loaded = VocabMap.load(path)
    assert np.array_equal(loaded.target_ids, vocab_map.target_ids)
    assert (loaded.hash, loaded.vocab_size, loaded.sources) == (vocab_map.hash, 8, ("a", "b"))
    first = path.read_bytes()
    vocab_map.save(path)
    assert path.read_bytes() == first
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_map_without_our_metadata_loads(tmp_path: Path) -> None:
    vocab_map = build_vocab_map({"a": STAGE_1}, 3)
    save_file({"d2t": vocab_map.d2t, "t2d": vocab_map.t2d}, tmp_path / "m.safetensors")
    assert VocabMap.load(tmp_path / "m.safetensors").hash == vocab_map.hash


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({"d2t": np.array([1, 3, 6]), "t2d": np.zeros(8, np.bool_)}, "offset form"),  # absolute ids: 6 + 2 = 8
        ({"d2t": np.array([1, 2, 2]), "t2d": np.zeros(8, np.bool_)}, "expected t2d to mark the 3 ids"),
        ({"d2t": np.array([3, 1, 0]), "t2d": np.zeros(8, np.bool_)}, "strictly ascending"),
        ({"d2t": np.array([1, 2], np.int32), "t2d": np.zeros(8, np.bool_)}, "int32"),
        ({"d2t": np.zeros(0, np.int64), "t2d": np.zeros(8, np.bool_)}, "D > 0"),
        ({"d2t": np.array([1, 2])}, r"found \['d2t'\]"),
    ],
)
def test_wrong_maps_are_refused(tmp_path: Path, tensors: dict[str, np.ndarray], found: str) -> None:
    path = tmp_path / "m.safetensors"
    save_file(tensors, path)
    with pytest.raises(InputError, match=found) as caught:
        VocabMap.load(path)
    assert str(path) in str(caught.value)


def test_missing_foreign_and_altered_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(InputError, match="found nothing there"):
        VocabMap.load(path)
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(InputError, match="expected safetensors"):
        VocabMap.load(path)
    build_vocab_map({"a": STAGE_1}, 3).save(path)
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    other = build_vocab_map({"a": STAGE_2}, 3)
    save_file({"d2t": other.d2t, "t2d": other.t2d}, path, metadata=metadata)
    assert json.loads(metadata["draftcache_vocab_map"])["draft_vocab_size"] == 3
    with pytest.raises(InputError, match="recorded hash"):
        VocabMap.load(path)
