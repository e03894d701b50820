"""What the training benchmark measures on: its store is a sound one, and its figures are what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from draft_train.config import TrainConfig
from draft_train.trainer import Trainer
from store.reader import StoreReader
from tools.bench.train import SHAPE
from tools.bench.train_loader import _metrics, drop_from_memory, write_store
from tools.cli import main

SMALL = replace(
    SHAPE, hidden_size=32, num_attention_heads=4, head_dim=16, vocab_size=4096, draft_vocab_size=1600, sliding_window=64
)


def test_the_store_is_sound_and_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_store(tmp_path / "store", SMALL, 300, 5, torch.device("cpu"))
    drop_from_memory(tmp_path / "store")
    assert main(["verify", str(tmp_path / "store")]) == 0, capsys.readouterr()
    store = StoreReader(tmp_path / "store")
    assert [len(store), int(store.index["tokens"].sum()), store.manifest.mode] == [5, 1500, "lossless"]
    config = TrainConfig(
        store=tmp_path / "store", output=tmp_path / "run", splits=("train",), device="cpu", num_attention_heads=4,
        head_dim=16, sliding_window=64, intermediate_size=64,
    )  # fmt: skip
    Trainer(config).run()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 5


def test_rates_are_of_the_whole_epoch() -> None:
    """A step that waits counts by the time that it took."""
    steps = [
        {"tokens": 100, "tokens_per_second": 100.0, "data_wait_share": 0.0},
        {"tokens": 100, "tokens_per_second": 25.0, "data_wait_share": 0.75},
    ]
    found = _metrics(steps, 1e9)
    assert found == {"tok_s": 40.0, "median_tok_s": 62.5, "data_wait_share": 0.6, "gb_s": 40.0}
