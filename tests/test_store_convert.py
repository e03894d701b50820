"""Copies between layouts, modes and shard sizes; what is written is read back, and a wrong bit is noticed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draftcache.draft_train.evaluate import evaluate
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.errors import CheckpointError, InputError, ManifestMismatchError, StoreError
from draftcache.store.convert import Conversion
from draftcache.store.format.bf16 import float32_to_bf16
from draftcache.store.format.tap_codecs import MODES
from draftcache.store.layouts.tar_shards import TarShardWriter
from draftcache.store.reader import StoreReader
from draftcache.store.verify import verify_store
from draftcache.store.writer import StoreWriter
from draftcache.tools.cli import main
from support.synthetic import LAYERS, conversation, manifest, turns, write_files, write_store
from support.training_runs import config

EXACT = ("bf16", "lossless")


def shard_files(root: Path) -> dict[str, bytes]:
    paths = [path for path in (root / "shards").rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def many(root: Path, gates: dict[str, Any] | None = None, **changes: Any) -> None:
    """20 conversations in 4 shards of two splits, with a quarantined one between."""
    rng = np.random.default_rng(0)
    made = manifest(shards=4, **changes)
    with StoreWriter(root, made, write_files) as writer:
        for shard in range(4):
            items = [
                conversation(rng, turns(50, (5, 45)), number=6 * (shard % 2) + k, split=shard // 2, mode=made.mode)
                for k in range(5)
            ]
            out = {"split": made.splits[shard // 2], "dataset_index": 6 * (shard % 2) + 5, "reason": "NaN"}
            extra = {
                "quarantined": [out],
                "gates": gates or {},
                "tail_mass": {"count": 1, "mean": shard},
                "provenance": {"n": 1},
            }
            writer.write_shard(shard, items, extra)
        writer.finish()


@pytest.mark.parametrize("mode", MODES)
def test_there_and_back_gives_the_same_files(tmp_path: Path, mode: str) -> None:
    many(tmp_path / "a", mode=mode)
    for source, target, layout in (("a", "b", "webdataset"), ("b", "c", "zarr")):
        assert main(["convert", str(tmp_path / source), str(tmp_path / target), "--layout", layout]) == 0
    assert shard_files(tmp_path / "a") == shard_files(tmp_path / "c")
    assert shard_files(tmp_path / "a").keys() != shard_files(tmp_path / "b").keys()
    one, two = StoreReader(tmp_path / "a"), StoreReader(tmp_path / "b")
    np.testing.assert_array_equal(one.index, two.index)
    carried = [{key: record[key] for key in ("quarantined", "gates", "tail_mass")} for record in one.records()]
    assert carried == [{key: record[key] for key in ("quarantined", "gates", "tail_mass")} for record in two.records()]
    assert not verify_store(tmp_path / "b").damages


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "float32"])
def test_modes_from_float32(tmp_path: Path, mode: str) -> None:
    write_store(tmp_path / "a")
    summary = Conversion(tmp_path / "a", tmp_path / "b", mode=mode).run()
    assert (summary.shards, summary.checked) == (2, 8)
    one, two = StoreReader(tmp_path / "a"), StoreReader(tmp_path / "b")
    for number in range(len(one)):
        before, after = one.read(number).arrays, two.read(number).arrays
        for layer in LAYERS:
            expected = float32_to_bf16(before.pop(f"tap_{layer}"))
            if mode in EXACT:
                np.testing.assert_array_equal(after.pop(f"tap_{layer}"), expected)
            else:
                assert after.pop(f"tap_{layer}").shape == expected.shape
                assert 0 < summary.largest_error[layer] < 0.1
        for name, values in before.items():
            np.testing.assert_array_equal(after[name], values)


def test_shards_of_another_size(tmp_path: Path) -> None:
    many(tmp_path / "a", mode="lossless")
    Conversion(tmp_path / "a", tmp_path / "b", shard_tokens=100).run()
    one, two = StoreReader(tmp_path / "a"), StoreReader(tmp_path / "b")
    assert two.manifest.shards == 10
    for number in range(len(one)):
        before, after = one.read(number), two.read(number)
        assert (before.content_hash, before.dataset_index) == (after.content_hash, after.dataset_index)
        for name, values in before.arrays.items():
            np.testing.assert_array_equal(after.arrays[name], values)
    quarantined = [item["dataset_index"] for record in two.records() for item in record["quarantined"]]
    assert quarantined == [5, 11, 5, 11]
    assert sum(record["tail_mass"]["count"] for record in two.records()) == int(one.index["teacher_rows"].sum())
    assert not verify_store(tmp_path / "b").damages


@pytest.mark.parametrize("changes", [{}, {"layout": "webdataset", "shard_tokens": 100}])
@pytest.mark.parametrize("mode", MODES)
def test_some_of_the_taps(tmp_path: Path, mode: str, changes: dict[str, Any]) -> None:
    many(tmp_path / "a", gates={str(layer): [5, 0.5 * layer, 1.0] for layer in LAYERS}, mode=mode)
    kept = (LAYERS[0], LAYERS[2])
    summary = Conversion(tmp_path / "a", tmp_path / "b", layers=kept, **changes).run()
    assert (summary.checked, summary.finished) == (20, True)
    assert summary.bytes_after < summary.bytes_before
    one, two = StoreReader(tmp_path / "a"), StoreReader(tmp_path / "b")
    assert [tap.layer for tap in two.manifest.taps] == list(kept)
    assert two.manifest.hash != one.manifest.hash
    dropped = set(one.codec.specs(LAYERS[1]))
    for number in range(len(one)):
        before, after = (store.read(number, decode=False).arrays for store in (one, two))
        assert after.keys() == before.keys() - dropped
        assert all(np.array_equal(after[name], before[name]) for name in after)
        assert set(two.read(number).arrays) == set(one.read(number).arrays) - {f"tap_{LAYERS[1]}"}
    gates = [record["gates"] for record in two.records() if record["gates"]]
    assert len(gates) == 4
    assert all(found == {str(layer): [5, 0.5 * layer, 1.0] for layer in kept} for found in gates)
    assert not verify_store(tmp_path / "b").damages
    with pytest.raises(ManifestMismatchError, match="taps"):
        Conversion(tmp_path / "a", tmp_path / "b", **changes).run()


def test_some_of_the_taps_in_another_mode_and_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_store(tmp_path / "a", mode="bf16")
    words = ["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--layers", "3,4"]
    assert main([*words, "--mode", "int8"]) == 0
    found = StoreReader(tmp_path / "b").manifest
    assert (found.layers, set(found.codec.channel_scales.scales)) == ((3, 4), {3, 4})  # type: ignore[attr-defined]
    assert not verify_store(tmp_path / "b").damages
    assert main([*words[:2], str(tmp_path / "c"), "--layers", "2,3"]) == 2
    said = capsys.readouterr().err
    assert "taps [1, 3, 4]" in said
    assert "--layers 1,2,3,4 --splits train,val --window 0 --teacher draft --top-k 6 --mode bf16" in said
    assert not (tmp_path / "c").exists()


def test_a_checkpoint_of_other_taps_names_the_command_that_makes_its_store(tmp_path: Path) -> None:
    write_store(tmp_path / "store", mode="bf16")
    fewer = tmp_path / "fewer"
    Conversion(tmp_path / "store", fewer, layers=(1, 4)).run()
    wide = Trainer(config(tmp_path, epochs=1)).run()
    narrow = Trainer(config(tmp_path, epochs=1, store=fewer, output=tmp_path / "narrow")).run()
    with pytest.raises(CheckpointError, match=r"its taps is .*draftcache convert .*store OTHER --layers 1,4$"):
        evaluate(store=tmp_path / "store", checkpoint=narrow, splits=["val"])
    with pytest.raises(CheckpointError, match=r"capture its taps too: draftcache capture .* --layers 1,3,4 "):
        evaluate(store=fewer, checkpoint=wide, splits=["val"])
    assert evaluate(store=fewer, checkpoint=narrow, splits=["val"])["splits"]["val"]["draft"]["verify_steps"] > 0


def test_a_wrong_bit_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the comparison."""
    write_store(tmp_path / "a", mode="bf16")
    damage_tap_3(monkeypatch)
    with pytest.raises(StoreError, match=r"expected tap_3 as in .*read back other values"):
        Conversion(tmp_path / "a", tmp_path / "b", layout="webdataset").run()
    with pytest.raises(StoreError, match=r"expected tap_3 as in .*read back other values"):
        Conversion(tmp_path / "a", tmp_path / "d", layout="webdataset", layers=(3, 4)).run()
    Conversion(tmp_path / "a", tmp_path / "c", layout="webdataset", check=False).run()


def test_a_failed_comparison_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard that differs is not committed, so that the next run makes and compares it again."""
    write_store(tmp_path / "a", mode="bf16")
    damage_tap_3(monkeypatch)
    for _ in range(2):
        with pytest.raises(StoreError, match=r"expected tap_3 as in .*read back other values"):
            Conversion(tmp_path / "a", tmp_path / "b", layout="webdataset").run()
        assert not (tmp_path / "b" / "commit" / "00000.json").exists()
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b"), "--layout", "webdataset"]) == 2
    monkeypatch.undo()
    summary = Conversion(tmp_path / "a", tmp_path / "b", layout="webdataset").run()
    assert (summary.shards, summary.checked, summary.finished) == (2, 8, True)
    assert not verify_store(tmp_path / "b").damages
    assert Conversion(tmp_path / "a", tmp_path / "b", layout="webdataset").run().checked == 0


def test_shards_that_were_committed_unchecked_are_compared_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_store(tmp_path / "a", mode="bf16")
    Conversion(tmp_path / "a", tmp_path / "good", layout="webdataset", check=False).run()
    assert Conversion(tmp_path / "a", tmp_path / "good", layout="webdataset").run().checked == 8
    damage_tap_3(monkeypatch)
    Conversion(tmp_path / "a", tmp_path / "bad", layout="webdataset", check=False).run()
    monkeypatch.undo()
    for _ in range(2):
        with pytest.raises(StoreError, match=r"read back other values.*did not compare it: remove .*bad"):
            Conversion(tmp_path / "a", tmp_path / "bad", layout="webdataset").run()
    Conversion(tmp_path / "good", tmp_path / "again", layout="zarr", check=False).run()
    assert not any("compared_with" in record for record in StoreReader(tmp_path / "again").records())


def damage_tap_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tar shards be written with a wrong bit, under a hash that fits it."""
    append = TarShardWriter.append

    def damaging(self: TarShardWriter, item: Any) -> None:
        item.arrays["tap_3"] = item.arrays["tap_3"].copy()
        item.arrays["tap_3"][2, 1] ^= 1
        append(self, item)

    monkeypatch.setattr(TarShardWriter, "append", damaging)


def test_what_can_not_be_made_is_refused(tmp_path: Path) -> None:
    write_store(tmp_path / "fp8", mode="fp8")
    with pytest.raises(InputError, match="expected exact states to make int8 of, found fp8"):
        Conversion(tmp_path / "fp8", tmp_path / "x", mode="int8")
    Conversion(tmp_path / "fp8", tmp_path / "x", mode="int8", allow_lossy_source=True).run()
    with pytest.raises(InputError, match="float32"):
        Conversion(tmp_path / "fp8", tmp_path / "y", mode="float32", allow_lossy_source=True)
    with pytest.raises(InputError, match="--shard-tokens"):
        Conversion(tmp_path / "fp8", tmp_path / "y", shard_tokens=0)
    with pytest.raises(ManifestMismatchError, match="layout: store has 'zarr', this job has 'webdataset'"):
        Conversion(tmp_path / "fp8", tmp_path / "x", mode="int8", allow_lossy_source=True, layout="webdataset").run()
    (tmp_path / "fp8" / "commit" / "index.json").unlink()
    (tmp_path / "fp8" / "commit" / "00001.json").unlink()
    with pytest.raises(StoreError, match="finished store"):
        Conversion(tmp_path / "fp8", tmp_path / "y")
    assert main(["convert", str(tmp_path / "x"), str(tmp_path / "y"), "--layout", "parquet"]) == 2


@pytest.mark.parametrize("layers", [None, (1, 4)])
def test_killed_and_rerun_equals_uninterrupted(tmp_path: Path, layers: tuple[int, ...] | None) -> None:
    many(tmp_path / "a", mode="lossless")
    changes: dict[str, Any] = {"layout": "webdataset", "shard_tokens": 50, "layers": layers}
    Conversion(tmp_path / "a", tmp_path / "whole", **changes).run()
    rng = np.random.default_rng(0)
    kills = 0
    for _ in range(60):
        child = os.fork()
        if child == 0:
            try:
                Conversion(tmp_path / "a", tmp_path / "cut", **changes).run()
            finally:
                os._exit(0)
        time.sleep(float(rng.uniform(0.005, 0.1)))
        os.kill(child, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        if (tmp_path / "cut" / "commit" / "index.json").exists():
            break
    Conversion(tmp_path / "a", tmp_path / "cut", **changes).run()
    assert kills >= 2
    assert shard_files(tmp_path / "cut") == shard_files(tmp_path / "whole")
