"""Acceptance by position and length, its intervals, and paired differences, against sums written out with loops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draftcache.draft_train.acceptance import AcceptanceCounts
from draftcache.draft_train.by_length import figures, require_edges
from draftcache.draft_train.eval_record import conversation_record, recorded_counts
from draftcache.draft_train.evaluate import evaluate
from draftcache.draft_train.examples import ACCEPTED, BONUS, PROMPT, REJECTED, VERIFIED
from draftcache.draft_train.intervals import interval, resampled_sums
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.errors import InputError, ManifestMismatchError
from draftcache.store.common.files import write_json
from draftcache.store.reader import StoreReader
from support.synthetic import write_store
from support.training_runs import config


def counts(table: list[list[tuple[int, int]]], edges: tuple[int, ...] = (10, 20)) -> AcceptanceCounts:
    """Make counts with these verify steps and tokens by conversation and bucket."""
    made = AcceptanceCounts(draft_tokens=3, edges=edges, members=len(table), conversations=len(table))
    made.by_conversation[:] = table
    return made


def test_resampled_sums_are_those_of_a_loop_and_do_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(24).reshape(12, 2)
    rng, expected = np.random.default_rng(3), []
    for row in rng.integers(12, size=(200, 12)):
        expected.append(values[row].sum(axis=0))
    np.testing.assert_array_equal(resampled_sums(values, resamples=200, seed=3), expected)
    assert not np.array_equal(resampled_sums(values, resamples=200, seed=4), expected)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Conversations differ more than their verify steps: an interval over steps would be far too narrow."""
    rng, covered = np.random.default_rng(0), 0
    for trial in range(200):
        rate = rng.beta(4, 4, size=60)
        tokens = rng.binomial(20, rate)
        table = np.stack((np.full(60, 20), tokens), axis=1)
        draws = resampled_sums(table, resamples=300, seed=trial)
        ends = interval(draws[:, 1] / draws[:, 0], 60)
        assert ends is not None
        covered += ends[0] <= 0.5 <= ends[1]
    assert 180 <= covered <= 199
    assert interval(np.ones(10), 4) is None


def test_buckets_sum_to_the_whole_and_the_gap_is_to_the_shortest() -> None:
    made = counts(
        [
            [(4, 12), (0, 0), (0, 0)],
            [(4, 8), (5, 10), (0, 0)],
            [(2, 4), (5, 5), (10, 10)],
            *[[(2, 4), (0, 0), (0, 0)]] * 3,
        ]
    )
    lengths = np.array([9, 19, 40, 8, 8, 8])
    row = figures({"draft": made}, lengths, resamples=200)["draft"]
    assert [(part["from"], part["to"]) for part in row["by_position"]] == [(0, 10), (10, 20), (20, None)]
    assert [part["verify_steps"] for part in row["by_position"]] == [16, 10, 10]
    assert [part["conversations"] for part in row["by_position"]] == [6, 2, 1]
    assert [part["acceptance_length"] for part in row["by_position"]] == [36 / 16, 1.5, 1.0]
    assert row["by_position"][0]["gap"] is None
    assert row["by_position"][1]["gap"] == pytest.approx(1.5 / (36 / 16) - 1)
    assert row["by_position"][2]["interval"] is None  # one conversation says nothing of how they differ
    assert [part["verify_steps"] for part in row["by_length"]] == [10, 9, 17]
    assert [part["tokens"] for part in row["by_length"]] == [24, 18, 19]
    low, high = row["interval"]
    assert low < row["acceptance_length"] < high


def test_a_paired_difference_is_narrower_than_unpaired_ones() -> None:
    """The control: the same two drafts on shuffled conversations, whose difference is as large and less certain."""
    rng = np.random.default_rng(1)
    steps = np.full(80, 50)
    tokens = rng.integers(60, 200, size=80)
    better = tokens + rng.integers(2, 6, size=80)
    tables = [counts([[(a, b), (0, 0), (0, 0)] for a, b in zip(steps, side, strict=True)]) for side in (better, tokens)]
    lengths = np.full(80, 9)
    (paired,) = figures({"a": tables[0], "b": tables[1]}, lengths, compare=[("a", "b")], resamples=500)["differences"]
    assert paired["interval"][0] > 0
    assert paired["difference"] == pytest.approx((better.sum() - tokens.sum()) / steps.sum())
    shuffled = counts([[(50, int(value)), (0, 0), (0, 0)] for value in rng.permutation(tokens)])
    (loose,) = figures({"a": tables[0], "b": shuffled}, lengths, compare=[("a", "b")], resamples=500)["differences"]
    assert loose["difference"] == pytest.approx(paired["difference"])
    assert np.diff(loose["interval"]) > 5 * np.diff(paired["interval"])


@pytest.mark.parametrize("edges", [[], [0, 5], [5, 5], [9, 3], [-1]])
def test_edges_that_make_no_buckets_are_refused(edges: list[int]) -> None:
    with pytest.raises(InputError, match="--length-buckets: expected ascending numbers of tokens above 0, found"):
        require_edges(edges)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store and two short runs on it, whose windows differ."""
    root = tmp_path_factory.mktemp("runs")
    write_store(root / "store", per_shard=6)
    for name, changes in (("one", {}), ("two", {"seed": 1, "sliding_window": 8})):
        Trainer(config(root, output=root / name, **changes)).run()
    return root


def ask(root: Path, **changes: Any) -> dict[str, Any]:
    asked = {"store": root / "store", "checkpoint": root / "one", "splits": ["val"], "draft_tokens": 3}
    asked |= {"length_buckets": [12, 30], "device": "cpu", "resamples": 200}
    return evaluate(**asked | changes)


def test_a_comparison_in_one_pass_and_with_a_file_say_the_same(runs: Path) -> None:
    other = ask(runs, checkpoint=runs / "two")
    write_json(runs / "two.json", other)
    paths = [runs / "two", runs / "two.json"]
    row = ask(runs, compare=paths)["splits"]["val"]
    assert [item["minus"] for item in row["differences"]] == [str(path) for path in paths]
    passed, read = row["differences"]
    assert {**passed, "minus": ""} == {**read, "minus": ""}
    alone = ask(runs)["splits"]["val"]["draft"]
    expected = alone["acceptance_length"] - other["splits"]["val"]["draft"]["acceptance_length"]
    assert passed["difference"] == pytest.approx(expected)
    assert row["draft"] == alone
    assert row["compared"][str(runs / "two")] == other["splits"]["val"]["draft"]
    assert [part["from"] for part in alone["by_position"]] == [0, 12, 30]


def test_only_the_same_conversations_are_compared(runs: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "train.json", ask(runs, splits=["train"]))
    with pytest.raises(ManifestMismatchError, match="expected conversations of 'val'"):
        ask(runs, compare=[tmp_path / "train.json"])
    write_json(tmp_path / "four.json", ask(runs, draft_tokens=4))
    with pytest.raises(ManifestMismatchError, match="expected draft tokens 3, found 4"):
        ask(runs, compare=[tmp_path / "four.json"])
    changed = ask(runs) | {"store_hash": "0" * 32}
    write_json(tmp_path / "store.json", changed)
    with pytest.raises(ManifestMismatchError, match=f"expected store .*, found {'0' * 32}"):
        ask(runs, compare=[tmp_path / "store.json"])
    write_json(tmp_path / "other.json", {"splits": {}})
    with pytest.raises(InputError, match="expected a file of `draftcache eval --output`"):
        ask(runs, compare=[tmp_path / "other.json"])


def test_what_is_kept_of_conversations_gives_the_counts_back(runs: Path, tmp_path: Path) -> None:
    store = StoreReader(runs / "store")
    members = store.members("val")
    body = ask(runs)
    write_json(tmp_path / "kept.json", body)
    like = AcceptanceCounts(draft_tokens=3, edges=(12, 30), members=len(members))
    back = recorded_counts(tmp_path / "kept.json", "val", store, members, like)
    kept = body["conversations"]["val"]
    assert conversation_record(store, members, {"draft": back})["counts"]["draft"] == kept["counts"]["draft"]
    assert back.acceptance_length == body["splits"]["val"]["draft"]["acceptance_length"]


def test_examples_show_each_token_with_its_fate(runs: Path) -> None:
    """The fates of a conversation, counted, are its verify steps and tokens."""
    found = ask(runs, show_conversations=3)
    row = found["splits"]["val"]
    shown = [*row["examples"]["best"], *row["examples"]["worst"]]
    assert len({item["dataset_index"] for item in shown}) == len(shown) == 6
    lengths = [item["acceptance_length"] for item in row["examples"]["best"] + row["examples"]["worst"][::-1]]
    assert lengths == sorted(lengths, reverse=True)
    store = StoreReader(runs / "store")
    totals = [0, 0]
    for item in shown:
        number = int(store.members("val")[item["dataset_index"]])
        stored = store.read(number, ["token_ids", "loss_mask"])
        assert item["token_ids"] == stored.arrays["token_ids"].tolist()
        fates = np.array(item["fates"])
        assert ((fates == PROMPT) == ~stored.loss_mask).all()
        opens = stored.loss_mask & ~np.append(False, stored.loss_mask[:-1])
        assert ((fates == VERIFIED) == opens).all()
        assert sorted(map(int, item["proposed"])) == np.flatnonzero(fates == REJECTED).tolist()
        assert all(item["token_ids"][int(place)] is not None for place in item["proposed"])
        totals[0] += item["verify_steps"]
        totals[1] += int(np.isin(fates, (ACCEPTED, REJECTED, BONUS)).sum())
    assert totals == [row["draft"]["verify_steps"], row["draft"]["tokens"]]


def test_the_host_waits_once_for_a_batch(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many drafts are measured, their results come to the host together."""
    copied: list[int] = []
    from draftcache.draft_train import measure

    gather = measure._to_host
    monkeypatch.setattr(measure, "_to_host", lambda tensors: copied.append(len(tensors)) or gather(tensors))
    ask(runs, bigram_splits=["train"])
    assert copied == [5]  # agreements, conversations and three drafts, of the one batch


def test_many_conversations_are_packed_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    from draftcache.draft_train import measure

    monkeypatch.setattr(measure, "_PACKED_AT_ONCE", 4)
    lengths = np.arange(1, 11)
    parts = measure._micro_batches(np.arange(10), lengths, 12)
    assert sorted(np.concatenate(parts).tolist()) == list(range(10))
    assert all(lengths[part].sum() <= 12 for part in parts)
