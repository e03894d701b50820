"""Caches that hold many conversations per file: DeepSpec's raw shards, and those of Automodel's DSpark trainer."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from draftcache.capture.peers.deepspec_files import RECORD
from draftcache.capture.peers.job import READERS
from draftcache.capture.peers.samples import DamagedSampleError, PeerSample
from draftcache.capture.verifier.load import Verifier
from draftcache.store.common.errors import InputError
from draftcache.store.reader import StoreReader
from draftcache.tools.cli import main
from support.peer_files import TAPS, Recorded, load, record, save_predictable, write_automodel, write_deepspec
from support.peer_imports import imported, require_equal_to_capture, settings


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_predictable(tmp_path_factory.mktemp("verifier") / "llama")


@pytest.fixture(scope="module")
def verifier(path: Path) -> Verifier:
    return load(path)


@pytest.fixture(scope="module")
def rows(verifier: Verifier) -> list[Recorded]:
    return record(verifier)


@pytest.fixture(scope="module")
def rounded(path: Path) -> list[Recorded]:
    """As the verifier computes them in bfloat16, in which DeepSpec stores them."""
    return record(load(path, torch.bfloat16))


def change_manifest(source: Path, **changes: Any) -> None:
    manifest = json.loads((source / "manifest.json").read_text()) | changes
    (source / "manifest.json").write_text(json.dumps({name: value for name, value in manifest.items() if value != ""}))


@pytest.mark.parametrize("probe", [True, False])
def test_deepspecs_cache_is_a_capture_to_the_bit(
    path: Path, rounded: list[Recorded], tokenizer_dir: Path, tmp_path: Path, probe: bool
) -> None:
    source = write_deepspec(tmp_path / "files", rounded)
    config = settings(path, tokenizer_dir, source, tmp_path / "store", "deepspec", probe=probe, layers=())
    summary = imported(config)
    assert (summary.files, summary.set_aside) == (4, [])  # an index and three shards
    found = summary.findings
    assert found["last_state"] == "after"
    assert found["auxiliary_states"] == (
        "compared with the verifier" if probe else "not compared: the blocks are those that the cache names"
    )
    assert found["weights"] == (
        "compared with the verifier's" if probe else "taken as given: the files name somebody/a-model"
    )
    layers = replace(config, capture=replace(config.capture, layers=TAPS))
    require_equal_to_capture(layers, compute_dtype="bfloat16")


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("pad", [2, "last"])
def test_automodels_cache_is_a_capture_to_the_bit(
    path: Path,
    verifier: Verifier,
    rows: list[Recorded],
    tokenizer_dir: Path,
    tmp_path: Path,
    attention: bool,
    pad: int | str,
) -> None:
    """Without an attention mask too, even if a text ends with the very token that pads it."""
    token = pad if isinstance(pad, int) else int(rows[0].token_ids[-1])
    source = write_automodel(tmp_path / "files", rows, verifier, attention=attention, pad=token)
    config = settings(path, tokenizer_dir, source, tmp_path / "store", "automodel", probe=False, layers=())
    summary = imported(config)
    assert not summary.set_aside
    assert summary.findings["weights"].startswith("embeddings and head compared with target_weights.safetensors")
    layers = replace(config, capture=replace(config.capture, layers=TAPS))
    require_equal_to_capture(layers)
    store = StoreReader(tmp_path / "store")
    assert [len(store.read(number).arrays["token_ids"]) for number in range(len(rows))] == [
        len(row.token_ids) for row in rows
    ]


@pytest.mark.parametrize("hidden_dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_deepspecs_float8_is_the_cast_that_its_own_reader_makes(
    path: Path, rows: list[Recorded], tokenizer_dir: Path, tmp_path: Path, hidden_dtype: str
) -> None:
    source = write_deepspec(tmp_path / "files", rows, hidden_dtype=hidden_dtype)
    config = settings(path, tokenizer_dir, source, tmp_path / "store", "deepspec", layers=(), last_state="after")
    imported(config)
    store = StoreReader(tmp_path / "store")
    for number in range(len(rows)):
        arrays = store.read(number).arrays
        row = next(row for row in rows if np.array_equal(row.token_ids, arrays["token_ids"]))
        expected = row.taps.to(getattr(torch, hidden_dtype)).to(torch.bfloat16).float()[arrays["positions"]]
        for place, layer in enumerate(TAPS):
            assert np.array_equal(arrays[f"tap_{layer}"], expected[:, place].numpy())


def test_states_that_are_no_blocks_output_are_left_out_and_said(
    path: Path, verifier: Verifier, rows: list[Recorded], tokenizer_dir: Path, tmp_path: Path
) -> None:
    """The embeddings, and Automodel's last id, which stands for the final norm's output; DeepSpec's is the block's."""
    last = len(verifier.blocks) - 1
    embedded = [
        replace(row, taps=torch.cat([torch.full_like(row.taps[:, :1], 7.0), row.taps, row.after[:, None]], 1))
        for row in rows
    ]
    ids = (-1, *TAPS, last)
    source = write_automodel(tmp_path / "automodel", embedded, verifier, layer_ids=ids)
    config = settings(path, tokenizer_dir, source, tmp_path / "a", "automodel", probe=True, layers=())
    assert imported(config).findings["states_left_out"] == [
        "the embeddings (layer id -1)",
        f"the final norm's output (layer id {last})",
    ]
    assert StoreReader(tmp_path / "a").manifest.layers == TAPS
    require_equal_to_capture(replace(config, capture=replace(config.capture, layers=TAPS)))

    own = [
        replace(row, taps=torch.cat([torch.full_like(row.taps[:, :1], 7.0), row.taps, row.before[:, None]], 1))
        for row in rows
    ]
    source = write_deepspec(tmp_path / "deepspec", own, layer_ids=ids)
    config = settings(path, tokenizer_dir, source, tmp_path / "d", "deepspec", probe=True, layers=())
    assert imported(config).findings["states_left_out"] == ["the embeddings (layer id -1)"]
    assert StoreReader(tmp_path / "d").manifest.layers == (*TAPS, last)


def test_damaged_conversations_of_deepspec_are_set_aside_one_by_one(
    path: Path, rounded: list[Recorded], tokenizer_dir: Path, tmp_path: Path
) -> None:
    more = [*rounded, *record(load(path, torch.bfloat16), count=5, seed=1)]
    source = write_deepspec(tmp_path / "files", more)
    records = np.fromfile(source / "samples.idx", RECORD)
    records["sample_id"][2] = 7
    records["shard_id"][4] = 9
    records["token_ids"][3] = 2**64 - 1
    records["length"][5] = 2**32 - 1
    records.tofile(source / "samples.idx")
    with (source / "shard-00000.bin").open("r+b") as file:
        file.seek(int(records["loss_mask"][0]))
        file.write(b"\x07")
        file.seek(int(records["attention_mask"][1]))
        file.write(b"\x00")
    cut = source / "shard-00003.bin"
    cut.write_bytes(cut.read_bytes()[:-5])
    (source / "shard-00004.bin").unlink()
    with (source / "samples.idx").open("ab") as file:
        file.write(b"more")
    config = settings(path, tokenizer_dir, source, tmp_path / "store", "deepspec", last_state="after", layers=())
    summary = imported(config)
    assert {Path(item.file).name: item.reason.split(", found")[0] for item in summary.set_aside} == {
        "samples.idx": "expected 10 records of 56 bytes, as manifest.json says",
        "samples.idx#2": "expected conversation 2 in one of 5 shards",
        "samples.idx#4": "expected conversation 4 in one of 5 shards",
        "shard-00000.bin#0": "expected a loss mask of zeros and ones",
        "shard-00000.bin#1": f"expected attention to all of its {len(more[1].token_ids)} tokens",
        "shard-00001.bin#3": f"expected its token_ids to end at byte {2**64 - 1 + 4 * len(more[3].token_ids)}",
        "shard-00002.bin#5": f"expected its token_ids to end at byte {int(records['token_ids'][5]) + 4 * (2**32 - 1)}",
        "shard-00003.bin#7": f"expected its last_state to end at byte {len(cut.read_bytes()) + 5}",
        "shard-00004.bin": "expected the shard that manifest.json names",
    }
    assert len(StoreReader(tmp_path / "store")) == 1  # 6
    assert summary.findings["set_aside"] == 9


def test_damaged_conversations_of_automodel_are_set_aside_one_by_one(
    path: Path, verifier: Verifier, rows: list[Recorded], tokenizer_dir: Path, tmp_path: Path
) -> None:
    more = [*rows, *record(verifier, count=5, seed=1)]
    source = write_automodel(tmp_path / "files", more, verifier)

    def change(shard: int, make: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
        file = source / f"shard-{shard:06d}.safetensors"
        save_file({name: values.contiguous() for name, values in make(load_file(file)).items()}, file)

    def padded_before(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["input_ids"][0] = tensors["input_ids"][0].roll(3)
        tensors["loss_mask"][1, 9] = 4
        return tensors

    change(0, padded_before)
    change(1, lambda tensors: tensors | {"target_last_hidden_states": tensors["target_last_hidden_states"][:, 1:]})
    change(2, lambda tensors: {name: values[:1] for name, values in tensors.items()})
    (source / "shard-000003.safetensors").unlink()
    config = settings(path, tokenizer_dir, source, tmp_path / "store", "automodel", last_state="after", layers=())
    summary = imported(config)
    assert {Path(item.file).name: item.reason.split(", found")[0][:60] for item in summary.set_aside} == {
        "shard-000000.safetensors#0": "expected padding behind the tokens only",
        "shard-000000.safetensors#1": "expected a loss mask of zeros and ones",
        "shard-000001.safetensors": summary.set_aside[2].reason.split(", found")[0][:60],
        "shard-000002.safetensors": "expected 2 conversations, as manifest.json says",
        "shard-000003.safetensors": "expected the shard that manifest.json promises",
    }
    assert "target_last_hidden_states" in summary.set_aside[2].reason
    assert len(StoreReader(tmp_path / "store")) == 3  # one of the third shard, two of the last


@pytest.mark.parametrize("peer", ["deepspec", "automodel"])
def test_a_shard_that_goes_while_its_states_are_read_is_damage(
    path: Path, verifier: Verifier, rows: list[Recorded], tmp_path: Path, peer: str
) -> None:
    writes = {"deepspec": write_deepspec, "automodel": lambda to, some: write_automodel(to, some, verifier)}
    source = writes[peer](tmp_path / "files", rows)
    cache = READERS[peer].open(source)
    file = next(item for item in cache.files if item.name != "samples.idx")
    sample = next(cache.read(file))
    assert isinstance(sample, PeerSample)
    assert sample.load()[0].shape == (len(rows[0].token_ids), len(TAPS), rows[0].after.shape[-1])
    file.unlink()
    with pytest.raises(DamagedSampleError, match=re.escape(str(file))):
        sample.load()


def test_rows_without_a_length_are_damage(verifier: Verifier, rows: list[Recorded], tmp_path: Path) -> None:
    source = write_automodel(tmp_path / "files", rows, verifier)
    file = source / "shard-000000.safetensors"
    for cut in (lambda values: values[:, :0], lambda values: values[:, 0]):
        save_file({name: cut(values).contiguous() for name, values in load_file(file).items()}, file)
        with pytest.raises(DamagedSampleError, match=r"expected input_ids \[n, S\] of n rows, found \[2"):
            list(READERS["automodel"].open(source).read(file))
        write_automodel(tmp_path / "again", rows, verifier)
        file.write_bytes((tmp_path / "again" / file.name).read_bytes())
        shutil.rmtree(tmp_path / "again")


def test_a_cache_of_another_verifier_or_form_is_refused(
    path: Path, verifier: Verifier, rows: list[Recorded], tokenizer_dir: Path, tmp_path: Path
) -> None:
    automodel = write_automodel(tmp_path / "automodel", rows, verifier)
    deepspec = write_deepspec(tmp_path / "deepspec", rows)
    good = {source: (source / "manifest.json").read_text() for source in (automodel, deepspec)}
    count = itertools.count()

    def refused(source: Path, peer: str, message: str, **changes: Any) -> None:
        values: dict[str, Any] = {"probe": False, "layers": (), **changes}
        with pytest.raises(InputError, match=message):
            imported(settings(path, tokenizer_dir, source, tmp_path / f"store-{next(count)}", peer, **values))
        (source / "manifest.json").write_text(good[source])

    for source, peer, manifest, message in (
        (automodel, "automodel", {"draft_vocab_size": 90}, "found the one of its Eagle3 trainer: renormalised prob"),
        (automodel, "automodel", {"format_version": 2}, "expected format_version 1 and a shard_size"),
        (automodel, "automodel", {"num_samples": 2}, "expected 1 shards, of 2 conversations, found 2 more"),
        (automodel, "automodel", {"hidden_size": ""}, "expected hidden_size, of type int, found None"),
        (automodel, "automodel", {"target_layer_ids": [2, 1, 0]}, "target_layer_ids in ascending order"),
        (deepspec, "deepspec", {"version": 1}, "expected a DeepSpec cache of .*'version': 2.* found .*'version': 1"),
        (deepspec, "deepspec", {"hidden_dtype": "int4"}, "expected hidden_dtype as one of"),
        (deepspec, "deepspec", {"shards": [{"file_name": "../x"}]}, "each with a file_name of its own in this folder"),
        (deepspec, "deepspec", {"shards": [{"file_name": "a"}] * 2}, "each with a file_name of its own in this folder"),
        (deepspec, "deepspec", {"shards": [{"file_name": "a", "shard_id": 1}]}, r"shard_id from 0 .* found \[1\]"),
        (deepspec, "deepspec", {"target_layer_ids": ["one"]}, "expected target_layer_ids, blocks from 0"),
    ):
        change_manifest(source, **manifest)
        refused(source, peer, message)
    refused(deepspec, "deepspec", r"names, \[0, 1, 2\], or nothing, found \[0, 1\]", layers=(0, 1))
    change_manifest(deepspec, target_layer_ids=[0, 1, 3])
    refused(deepspec, "deepspec", "auxiliary state 2: expected the output of block 3", probe=True)

    only = write_deepspec(tmp_path / "only", [replace(row, taps=row.taps[:, :1]) for row in rows], layer_ids=(-1,))
    good[only] = (only / "manifest.json").read_text()
    refused(only, "deepspec", "no state of this cache is a block's output")

    other = write_deepspec(tmp_path / "other", rows)
    change_manifest(other, target_model_name_or_path="somebody/else")
    held_out = (("held_out", other),)
    refused(
        deepspec, "deepspec", "expected a cache of somebody/a-model .* found one of somebody/else", held_out=held_out
    )
    (deepspec / "samples.idx").unlink()
    refused(deepspec, "deepspec", "samples.idx: expected the index of 5 conversations, found no file")

    weights = load_file(automodel / "target_weights.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, automodel / "target_weights.safetensors")
    refused(automodel, "automodel", "expected the verifier's own lm_head.weight .* the cache is of another verifier")
    (automodel / "target_weights.safetensors").write_bytes(b"cut")
    refused(automodel, "automodel", "target_weights.safetensors: expected a whole safetensors file")


def test_the_command_needs_no_layers_and_says_what_was_set_aside(
    path: Path, rounded: list[Recorded], tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_deepspec(tmp_path / "files", rounded)
    (source / "shard-00001.bin").unlink()
    words = ["import", source, "--from", "deepspec", "--verifier", path, "--tokenizer", tokenizer_dir, "--top-k", "16",
             "--draft-vocab-size", "100", "--window", "20", "--output", tmp_path / "store"]  # fmt: skip
    assert main([str(word) for word in words]) == 1
    said = capsys.readouterr().out
    assert "3 conversations" in said
    assert "of 4 files of deepspec; 1 set aside, 0 conversations quarantined" in said
    assert "shard-00001.bin: expected the shard that manifest.json names, found no file" in said
    assert StoreReader(tmp_path / "store").manifest.layers == TAPS
    assert main([str(word) for word in words]) == 1  # goes on, and has nothing left to do
    assert "3 conversations" in capsys.readouterr().out
