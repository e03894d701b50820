"""The store benchmark end to end at a tiny size; what it compares is compared, and a damaged copy is noticed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from draftcache.store.common.errors import StoreError
from draftcache.store.format.bf16 import bf16_to_float32
from draftcache.store.reader import StoreReader
from draftcache.tools.bench import store as bench
from draftcache.tools.bench.parts.store_cases import MODES, check, choose_windows, make_cases
from draftcache.tools.bench.parts.store_content import Content, exponent_entropy, from_store, generate
from support.synthetic import write_store

CASES = (
    *(f"ours-{mode}" for mode in MODES),
    *("zarr-python", "webdataset", "torch-save", "safetensors", "raw-preadv"),
)
METRICS = ("bytes_per_token", "write_cpu_s_per_gb", "read_cpu_s_per_gb", "read_gb_s", "window_gb_s", "open_30k_ms")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The benchmark leaves torch with one thread."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def content() -> Content:
    return generate(0.01)


@pytest.fixture(scope="module")
def written(content: Content, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cases")
    for case in make_cases(root, content, durable=False):
        case.write()
    return root


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["store", *arguments])
    bench.main()


def test_every_case_has_every_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results" / "store.json"
    sizes = ("--gb", "0.01", "--rounds", "1", "--open-conversations", "20")
    run(monkeypatch, *sizes, "--work", str(tmp_path), "--output", str(output))
    rows = json.loads(output.read_text())
    found = {(row["case"], row["metric"]): row["value"] for row in rows}
    assert set(found) >= {(case, metric) for case in CASES for metric in METRICS}
    assert len(found) == len(rows)
    assert all(np.isfinite(value) and value > 0 for value in found.values())
    assert {row["unit"] for row in rows if row["metric"] == "open_30k_ms"} == {"ms (20 conversations)"}
    assert found["ours-lossless", "bf16_size_ratio"] > 1.35
    assert found["specforge", "bytes_per_token"] == pytest.approx(21_520, rel=0.01)
    assert found["speculators", "bytes_per_token"] == pytest.approx(21_512, rel=0.01)
    assert found["speculators-fp8", "bytes_per_token"] == pytest.approx(10_764, rel=0.01)
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    table = capsys.readouterr().out
    assert all(f"| {case} " in table for case in CASES)
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


def test_sizes_of_a_store_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_store(tmp_path / "store", window=8)
    run(monkeypatch, "--store", str(tmp_path / "store"), "--output", str(tmp_path / "sizes.json"))
    rows = json.loads((tmp_path / "sizes.json").read_text())
    assert {row["case"] for row in rows if row["metric"] == "bytes_per_token"} > set(CASES)
    assert not {row["metric"] for row in rows} & set(METRICS[1:])


def test_content_of_a_store_is_its_own_rounded_to_bf16(tmp_path: Path) -> None:
    write_store(tmp_path / "store")
    found = from_store(tmp_path / "store")
    assert found.tokens == 2 * 4 * 40
    expected = StoreReader(tmp_path / "store").read(5).arrays
    np.testing.assert_array_equal(found.conversations[5].arrays["teacher_gaps"], expected["teacher_gaps"])
    bits = found.conversations[5].arrays["tap_1"]
    assert bits.dtype == np.uint16
    np.testing.assert_allclose(bf16_to_float32(bits), expected["tap_1"], rtol=2**-8)


def test_states_hold_as_much_as_real_ones(content: Content) -> None:
    assert 2.8 <= exponent_entropy(content) <= 3.1
    lengths = content.lengths("tokens")
    assert lengths.max() > 2 * np.median(lengths)


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_copy_is_noticed(name: str, content: Content, written: Path) -> None:
    windows = choose_windows(content, 64)
    case = next(case for case in make_cases(written, content) if case.name == name)
    check(case, windows)
    case.close()
    largest = max((path for path in case.root.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    original = largest.read_bytes()
    damaged = bytearray(original)
    damaged[len(damaged) // 2] ^= 0x10
    largest.write_bytes(damaged)
    try:
        with pytest.raises((StoreError, ValueError)):
            check(case, windows)
    finally:
        case.close()
        largest.write_bytes(original)
