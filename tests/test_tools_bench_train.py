"""What the training benchmark measures on: its store is a sound one, and its figures are what they say."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.drafts.block.fused_pass import BlockPass
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.errors import DraftcacheError
from draftcache.store.reader import StoreReader
from draftcache.tools.bench import train
from draftcache.tools.bench.parts import block_cases
from draftcache.tools.bench.parts.block_cases import BLOCK_CASES, LIMIT, gradient_error, needed_block_flops
from draftcache.tools.bench.parts.train_cases import SHAPE, Case, needed_flops, synthetic_batch
from draftcache.tools.bench.parts.train_loader import _metrics, _read_through, drop_from_memory, write_store
from draftcache.tools.bench.parts.train_steps import block_step
from draftcache.tools.cli import main
from draftcache.tools.result_rows import some_of

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


def test_the_disk_is_read_to_the_last_byte(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes((3 << 20) + 7))
    assert _read_through(path) == (3 << 20) + 7


@pytest.mark.parametrize(("share", "window_filled"), [(1.0, 7 / 8), (0.5, (1536 + 3584 + 6 * 4096) / (8 * 4096))])
def test_needed_operations_are_those_counted_by_hand(share: float, window_filled: float) -> None:
    """MFLOP per row and step: q 44, o 22, MLP 130, head 172, k and v 5.5, of all rows once; attention 67; fc 43 once.

    With half of the rows, these are the second halves of turns of 2048, the first two within the first window.
    """
    length = 16_384
    found = needed_flops(synthetic_batch(Case((length,), share), torch.device("cpu"))) / length / 1e6
    products = 6 * share * (44 + 22 + 130 + 172) + 5.5 * (1 + 5 * share) + 43
    assert found == pytest.approx(3 * products + 3.5 * 6 * share * 67 * window_filled, rel=0.005)


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "slots", "rows", "head", "window"),
    [("dspark-32k", 8, 8, 188.4 * 2 + 16.4, 1024), ("dflash-32k", 8, 7, 172 * 2, 1024),
     ("dspark-32k-window-4096", 8, 8, 188.4 * 2 + 16.4, 4096)],
)  # fmt: skip
def test_needed_operations_of_blocks_are_those_counted_by_hand(
    name: str, slots: int, rows: int, head: float, window: int
) -> None:
    """MFLOP per slot and layer: q, k and v 24.8, o 22, MLP 99.1; of rows: head 188.4 (172 without the Markov head's),
    whose own weights need 16.4 more; of context: fc 86.7 twice, k and v of six layers 2.75 each.

    The first layer's inputs need no gradient. A slot sees a full window, or all that there is.
    """
    length, shape = 16_384, BLOCK_CASES[name].shape()
    batch = synthetic_batch(Case((length,)), CPU, replace(shape, hidden_size=8), shape.steps)
    products = slots * (18 * (24.8 + 22 + 99.1) - 24.8) + rows * head + 2 * 86.7 + 18 * 2.75
    attention = 3.5 * 4 * 4096 * window * (1 - window / 2 / length) * slots * 6 / 1e6
    assert needed_block_flops(shape, batch) / length / 1e6 == pytest.approx(products + attention, rel=0.005)


@pytest.mark.parametrize("name", ["dspark-32k", "dflash-32k"])
def test_gradients_of_blocks_are_checked_before_they_are_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(case: block_cases.BlockCase, device: torch.device) -> float:
        return gradient_error(case, device, lengths=(40, 20))

    assert error(BLOCK_CASES[name], CPU) < LIMIT / 2
    whole = BlockPass._slices
    monkeypatch.setattr(BlockPass, "_slices", lambda *given: list(whole(*given))[1:])  # the negative control
    monkeypatch.setattr(train, "gradient_error", error)
    measured = train.measure_block(argparse.Namespace(profile=False), name, CPU, 1.0, set())
    case, metrics = next(measured)
    assert case == f"{BLOCK_CASES[name].draft}-gradients"
    assert metrics["gradient_error"] > LIMIT
    with pytest.raises(DraftcacheError, match=r"expected gradients within 0\.05"):
        next(measured)


def test_a_block_case_trains_its_drawn_anchors(monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(
        BLOCK_CASES["dspark-32k"].shape(), hidden_size=32, num_attention_heads=4, head_dim=16, vocab_size=4096,
        draft_vocab_size=1600, intermediate_size=64, window=16, mask_token_id=4095, markov_rank=8,
    )  # fmt: skip
    monkeypatch.setattr(block_cases.BlockCase, "shape", lambda _: small)
    case = block_cases.BlockCase(batch=Case((60, 40), anchors=12))
    batch = synthetic_batch(case.batch, CPU, small, small.steps, text=True)
    assert [len(batch.start_index), int(batch.conversation.sum()), batch.conversations] == [24, 12, 2]
    step = block_step(case, CPU)
    losses = [float(step(batch).loss) for _ in range(3)]
    assert losses[2] < losses[0]


def test_lists_of_arguments_take_nothing_else() -> None:
    parse = some_of(["a", "b"])
    assert parse("b,a") == ["b", "a"]
    with pytest.raises(argparse.ArgumentTypeError, match="expected some of a, b, found c"):
        parse("a,c")
