"""`draftcache eval` as a command: its tables, its file, comparisons, and the check against real decoding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from draftcache.draft_train.trainer import Trainer
from draftcache.tools.cli import main
from support.synthetic import write_store
from support.training_runs import config


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("eval")
    write_store(made / "store", per_shard=6)
    for name, seed in (("one", 0), ("two", 1)):
        Trainer(config(made, output=made / name, seed=seed)).run()
    return made


def evaluation(root: Path, *more: object) -> int:
    return main(
        [
            "eval", "--store", str(root / "store"), "--checkpoint", str(root / "one"), "--splits", "val",
            "--draft-tokens", "3", "--device", "cpu", "--resamples", "200", *map(str, more),
        ]
    )  # fmt: skip


def test_tables_by_length_with_intervals_and_differences(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--length-buckets", "12,30", "--compare", root / "two", "--temperature", 1, "--bigram-splits", "train")
    assert evaluation(root, *asked) == 0
    text = capsys.readouterr().out
    assert "val, by position (longest conversation of its training store: 40)" in text
    assert "\n0-12 " in text
    assert "\n30 and more " in text
    assert "by conversation length" not in text  # all are of one length
    assert f"val: this draft minus {root / 'two'} (" in text
    assert "under speculative sampling at T = 1: acceptance between " in text
    assert "intervals: over conversations, 200 draws with replacement, seed 0" in text


def test_json_leaves_out_what_the_file_keeps(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluation(root, "--json", "--output", tmp_path / "eval.json") == 0
    shown, kept = json.loads(capsys.readouterr().out), json.loads((tmp_path / "eval.json").read_text())
    assert set(kept) - set(shown) == {"kind", "conversations"}
    assert len(kept["splits"]["val"].pop("examples")["best"]) == 3
    assert kept["splits"] == shown["splits"]
    assert kept["checkpoint_path"] == str(root / "one" / "checkpoints" / kept["checkpoint"])
    assert evaluation(root, "--compare", tmp_path / "eval.json") == 0
    assert ": +0.000 tokens per verify step, 95% interval +0.000 .. +0.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--online"], "expected --online and --verifier together, found one of them"),
        (["--verifier", "here"], "expected --online and --verifier together, found one of them"),
        (["--online", "--verifier", "here", "--online-prompts", "0"], "--online-prompts: expected at least 2, found 0"),
        (["--length-buckets", "1k"], "--length-buckets: expected numbers of tokens, comma-separated, found '1k'"),
        (["--seed", "-1"], "--seed: expected 0 or more, found -1"),
        (["--resamples", "5"], "--resamples: expected at least 100, found 5"),
        (["--temperature", "0"], "--temperature: expected 0.05 to 20, found 0.0"),
        (["--compare", "none"], "none: expected a checkpoint"),
        (["--show-conversations", "-1"], "--show-conversations: expected 0 or more, found -1"),
    ],
)
def test_bad_flags_are_refused(root: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    assert evaluation(root, *flags) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
