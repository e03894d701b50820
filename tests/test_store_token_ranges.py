"""Token ranges, reaches and single arrays: what comes back, and that no more than that is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from draftcache.store.common.errors import InputError
from draftcache.store.format.rows import start_rows
from draftcache.store.reader import StoreReader
from draftcache.store.storage.local import LocalStorage
from draftcache.store.writer import StoreWriter
from support.synthetic import HIDDEN, LAYERS, conversation, manifest, turns, write_files

LENGTH, WINDOW = 900, 60
MASKS = (
    turns(LENGTH, (100, 220), (300, 303), (500, 890)),
    turns(LENGTH, (2, 9)),
    turns(LENGTH, (880, 900)),
)
TAPS = [f"tap_{layer}" for layer in LAYERS]


def chunked(monkeypatch: pytest.MonkeyPatch, rows: int = 32) -> None:
    """Small chunks, so that a conversation has many."""
    monkeypatch.setattr("draftcache.store.format.array_spec.CHUNK_ROWS", rows)
    monkeypatch.setattr("draftcache.store.format.array_spec._CHUNK_BYTES", 1)


@pytest.fixture(params=["zarr", "webdataset"])
def layout(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make(root: Path, layout: str, mode: str = "lossless", window: int | None = None) -> StoreReader:
    rng = np.random.default_rng(0)
    made = manifest(mode=mode, shards=1, window=window, layout=layout)
    with StoreWriter(root, made, write_files) as writer:
        items = [conversation(rng, mask, window=window, number=n, mode=mode) for n, mask in enumerate(MASKS)]
        writer.write_shard(0, items, {"quarantined": [], "gates": {}})
        writer.finish()
    return StoreReader(root)


def reach(mask: NDArray[np.bool_], window: int, tokens: tuple[int, int]) -> list[int]:
    """Rows t that a start row s of the range reads, written out with loops."""
    starts = [int(s) for s in start_rows(mask) if tokens[0] <= s < tokens[1]]
    return [t for t in range(len(mask)) if any(t <= s < t + window for s in starts)]


RANGES = [(0, LENGTH), (0, 0), (110, 111), (150, 520), (890, LENGTH), (301, 302)]


@pytest.mark.parametrize("mode", ["float32", "lossless", "int8"])
@pytest.mark.parametrize("tokens", RANGES)
def test_a_token_range_is_the_slice_of_everything(
    tmp_path: Path, layout: str, mode: str, tokens: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    chunked(monkeypatch)
    reader = make(tmp_path, layout, mode)
    first, last = tokens
    for number in range(len(MASKS)):
        whole, part = reader.read(number).arrays, reader.read(number, tokens=tokens).arrays
        rows = (whole["positions"] >= first) & (whole["positions"] < last)
        places = (whole["teacher_positions"] >= first) & (whole["teacher_positions"] < last)
        for name, values in part.items():
            axis = reader.specs[name].axis if name in reader.specs else "rows"
            pick = {"tokens": slice(first, last), "rows": rows, "teacher": places}[axis]
            np.testing.assert_array_equal(values, whole[name][pick], err_msg=name)


@pytest.mark.parametrize("tokens", RANGES)
@pytest.mark.parametrize("window", [1, 7, WINDOW])
def test_a_window_gives_the_rows_that_start_rows_of_the_range_read(
    tmp_path: Path, layout: str, tokens: tuple[int, int], window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunked(monkeypatch)
    for stored_window in (None, WINDOW):
        reader = make(tmp_path / str(stored_window), layout, window=stored_window)
        for number, mask in enumerate(MASKS):
            part = reader.read(number, tokens=tokens, window=window).arrays
            assert part["positions"].tolist() == reach(mask, window, tokens)
            whole = reader.read(number).arrays
            rows = np.searchsorted(whole["positions"], part["positions"])
            for name in TAPS:
                np.testing.assert_array_equal(part[name], whole[name][rows])


def test_some_taps_and_the_teacher_alone_into_the_caller_s_memory(tmp_path: Path, layout: str) -> None:
    reader = make(tmp_path, layout)
    whole = reader.read(0).arrays
    assert set(reader.read(0, ["tap_3"]).arrays) == {"tap_3"}
    teacher = [name for name, spec in reader.specs.items() if spec.axis == "teacher"]
    assert set(reader.read(0, teacher).arrays) == set(teacher)
    out = {"tap_3": np.full((LENGTH, HIDDEN), 7, np.uint16), "argmax": np.full(LENGTH, 7, np.uint32)}
    part = reader.read(0, ["tap_3", "argmax"], tokens=(150, 520), out=out).arrays
    for name, values in part.items():
        assert np.shares_memory(values, out[name])
    np.testing.assert_array_equal(part["tap_3"], reader.read(0, ["tap_3"], tokens=(150, 520)).arrays["tap_3"])
    assert (out["tap_3"][len(part["tap_3"]) :] == 7).all()
    assert whole["tap_3"].shape[0] > len(part["tap_3"])


def test_no_more_is_read_than_the_chunks_that_hold_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunked(monkeypatch)
    reader = make(tmp_path, "zarr", "bf16")
    read: list[tuple[str, int]] = []
    original = LocalStorage.open

    def counting(self: LocalStorage, name: str) -> Any:
        file = original(self, name)

        class Counting:
            size = file.size

            def read_into(self, offset: int, buffers: Any) -> None:
                read.append((name, sum(memoryview(buffer).nbytes for buffer in buffers)))
                file.read_into(offset, buffers)

            def close(self) -> None:
                file.close()

        return Counting()

    monkeypatch.setattr(LocalStorage, "open", counting)
    reader.read(0, ["tap_3"], tokens=(200, 210))
    taps = [(name, size) for name, size in read if "tap_" in name]
    rows = reader.index["rows"].sum()
    chunks = -(-int(rows) // 32)
    index_bytes = chunks * 16 + 4
    assert {name.split("/")[-2] for name, _ in taps} == {"tap_3"}  # the other taps were not touched
    assert sum(size for _, size in taps) <= index_bytes + 2 * (32 * HIDDEN * 2 + 4)
    assert all(name.split("/")[-2] in ("tap_3", "positions") for name, _ in read)


def test_what_is_not_there_is_refused(tmp_path: Path, layout: str) -> None:
    reader = make(tmp_path, layout, window=WINDOW)
    for tokens in ((-1, 5), (5, 4), (0, LENGTH + 1)):
        with pytest.raises(InputError, match=rf"token range inside 0 \.\. {LENGTH}"):
            reader.read(0, tokens=tokens)
    with pytest.raises(InputError, match=r"window of at most 60, found 61; rows beyond it were not stored"):
        reader.read(0, window=WINDOW + 1)
    with pytest.raises(InputError, match=r"expected arrays among .*found \['tap_2'\]"):
        reader.read(0, ["tap_2"])
