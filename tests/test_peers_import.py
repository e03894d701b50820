"""Caches of other projects as stores: equal to a capture of the same conversations, and refused where they are not."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from draftcache.capture.peers.verifier_parts import parts_of, read_parts
from draftcache.capture.verifier.load import load_verifier
from draftcache.store.common.errors import InputError
from draftcache.store.format.commits import committed_shards
from draftcache.store.reader import StoreReader
from draftcache.store.storage.base import open_storage
from draftcache.tools.bench.parts.tiny_verifiers import save_tiny_model
from draftcache.tools.cli import main
from support.peer_files import (
    TAPS,
    Recorded,
    load,
    record,
    save_predictable,
    write_modelopt,
    write_specforge,
    write_speculators,
)
from support.peer_imports import imported, require_equal_to_capture, settings


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_predictable(tmp_path_factory.mktemp("verifier") / "llama")


@pytest.fixture(scope="module")
def rows(verifier: Path) -> list[Recorded]:
    return record(load(verifier))


WRITERS = {"speculators": write_speculators, "specforge": write_specforge, "modelopt": write_modelopt}


@pytest.mark.parametrize(
    ("peer", "probe"), [("speculators", True), ("speculators", False), ("specforge", False), ("modelopt", True)]
)
def test_an_import_is_a_capture_to_the_bit(
    verifier: Path, rows: list[Recorded], tokenizer_dir: Path, tmp_path: Path, peer: str, probe: bool
) -> None:
    source = WRITERS[peer](tmp_path / "files", rows)
    config = settings(verifier, tokenizer_dir, source, tmp_path / "store", peer, probe=probe)
    summary = imported(config)
    assert not summary.set_aside
    assert summary.findings["last_state"] == ("before" if peer == "speculators" else "after")
    assert summary.findings["auxiliary_states"].startswith("compared" if probe else "not compared")
    require_equal_to_capture(config)
    provenance = StoreReader(tmp_path / "store").manifest.provenance
    assert provenance["import"]["from"] == peer
    assert provenance["import"]["ssm_state_dtype"] == "unknown"
    assert provenance["forward"]["name"] == "recorded"


def test_a_hybrid_in_bfloat16_with_its_last_block_as_a_tap(tokenizer_dir: Path, tmp_path: Path) -> None:
    """NemotronH's modules are found without its weights; the last state is the last block's output, and its norm is."""
    verifier = save_predictable(tmp_path / "nemotron", "nemotron_h")
    source = write_speculators(tmp_path / "files", record(load(verifier, torch.bfloat16), count=3))
    options: dict[str, Any] = {"layers": (*TAPS, 4), "last_state": "before"}
    config = settings(verifier, tokenizer_dir, source, tmp_path / "store", "speculators", **options)
    imported(config)
    require_equal_to_capture(config, compute_dtype="bfloat16")
    assert StoreReader(tmp_path / "store").manifest.compute_dtype == "bfloat16"


def test_speculators_float8_is_read_as_its_own_code_reads_it(
    verifier: Path, rows: list[Recorded], tokenizer_dir: Path, tmp_path: Path
) -> None:
    source = write_speculators(tmp_path / "files", rows, float8=True)
    imported(settings(verifier, tokenizer_dir, source, tmp_path / "store", "speculators"))
    store = StoreReader(tmp_path / "store")
    assert store.manifest.compute_dtype == "bfloat16"
    item = store.read(0)
    row = next(row for row in rows if np.array_equal(row.token_ids, item.arrays["token_ids"]))
    states = torch.cat([row.taps, row.before[:, None]], 1)
    scale = states.abs().amax((1, 2), keepdim=True) / 448
    expected = (states / scale).to(torch.float8_e4m3fn).to(torch.bfloat16) * scale.to(torch.bfloat16)
    found = torch.from_numpy(item.arrays["tap_1"].copy())
    assert torch.equal(found, expected[:, 1].float()[item.arrays["positions"]])


def swapped(states: torch.Tensor) -> torch.Tensor:
    return states[:, [1, 0, 2, 3]]


def shifted_taps(states: torch.Tensor) -> torch.Tensor:
    return torch.cat([states[:, :3].roll(1, 0), states[:, 3:]], 1)


def one_block_late(states: torch.Tensor) -> torch.Tensor:
    return states[:, [1, 2, 3, 3]]


def shifted_last(states: torch.Tensor) -> torch.Tensor:
    return torch.cat([states[:, :3], states[:, 3:].roll(1, 0)], 1)


def shifted_early(states: torch.Tensor) -> torch.Tensor:
    return torch.cat([states[:, :3], states[:, 3:].roll(-1, 0)], 1)


def other_numbers(states: torch.Tensor) -> torch.Tensor:
    return torch.cat([states[:, :3], torch.randn(states[:, 3:].shape, generator=torch.Generator().manual_seed(0))], 1)


def wrong_last(states: torch.Tensor) -> torch.Tensor:
    return states[:, [0, 1, 2, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swapped, "auxiliary state 0: expected the output of block 0 .* found the output of block 1 nearest"),
        (
            shifted_taps,
            "auxiliary state 0: expected the output of block 0 .* found .* block 0, one row too late",
        ),
        (one_block_late, "auxiliary state 0: expected the output of block 0 .* found the output of block 1 nearest"),
        (shifted_last, "last state: expected .* found the output of block 3, one row too late nearest"),
        (wrong_last, "last state: expected .* found the output of block 0 nearest"),
    ],
)
def test_the_verifier_shows_what_states_are_not(
    verifier: Path, rows: list[Recorded], tokenizer_dir: Path, tmp_path: Path, change: Any, message: str
) -> None:
    source = write_speculators(tmp_path / "files", rows, states=change)
    with pytest.raises(InputError, match=message):
        imported(settings(verifier, tokenizer_dir, source, tmp_path / "store", "speculators"))
    assert not (tmp_path / "store" / "commit").exists()


@pytest.mark.parametrize("change", [shifted_last, shifted_early, other_numbers])
def test_following_tokens_show_a_wrong_last_state_without_the_verifier(
    verifier: Path, rows: list[Recorded], tokenizer_dir: Path, tmp_path: Path, change: Any
) -> None:
    source = write_speculators(tmp_path / "files", rows, states=change)
    with pytest.raises(InputError, match="neither is plausible"):
        imported(settings(verifier, tokenizer_dir, source, tmp_path / "store", "speculators", probe=False))


@pytest.mark.parametrize(("before", "stated"), [(True, "after"), (False, "before")])
def test_a_convention_that_the_norm_contradicts_is_refused(
    verifier: Path, rows: list[Recorded], tokenizer_dir: Path, tmp_path: Path, before: bool, stated: str
) -> None:
    source = write_specforge(tmp_path / "files", rows, before_norm=before)
    with pytest.raises(InputError, match=f"--last-state {stated}: expected states {stated} the final norm"):
        imported(settings(verifier, tokenizer_dir, source, tmp_path / "store", "specforge", last_state=stated))
    config = settings(verifier, tokenizer_dir, source, tmp_path / "store", "specforge", probe=False)
    assert imported(config).findings["last_state"] == ("before" if before else "after")  # whatever is usual there
    require_equal_to_capture(config)


def test_what_a_file_says_of_its_last_state_is_checked(
    verifier: Path, rows: list[Recorded], tokenizer_dir: Path, tmp_path: Path
) -> None:
    true = write_modelopt(tmp_path / "true", rows, before_norm=True)
    imported(settings(verifier, tokenizer_dir, true, tmp_path / "store", "modelopt"))
    lie = write_modelopt(tmp_path / "lie", [replace(row, after=row.before) for row in rows], before_norm=False)
    with pytest.raises(InputError, match=r"as the file says \(after the final norm\), found that it is before"):
        imported(settings(verifier, tokenizer_dir, lie, tmp_path / "other", "modelopt"))


class Code:
    """What pickle would run."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self._marker,)


def test_damaged_files_and_code_are_set_aside_one_by_one(
    verifier: Path, rows: list[Recorded], tokenizer_dir: Path, tmp_path: Path
) -> None:
    source = write_specforge(tmp_path / "files", rows)
    cut = source / "data_0.ckpt"
    cut.write_bytes(cut.read_bytes()[:-700])
    marker = tmp_path / "ran"
    torch.save({"input_ids": Code(marker)}, source / "data_7.ckpt")
    torch.save({"input_ids": torch.arange(5)}, source / "data_8.ckpt")
    (source / "data_9.ckpt").write_bytes(b"")
    whole = torch.load(source / "data_1.ckpt", weights_only=True)
    torch.save(whole | {"hidden_state": whole["hidden_state"][:, :-1]}, source / "data_10.ckpt")
    torch.save(whole | {"input_ids": whole["input_ids"][:-2]}, source / "data_11.ckpt")
    with gzip.open(source / "data_12.ckpt.gz", "wb") as file:
        file.write((source / "data_2.ckpt").read_bytes())
    summary = imported(settings(verifier, tokenizer_dir, source, tmp_path / "store", "specforge"))
    assert not marker.exists()
    assert sorted(Path(item.file).name for item in summary.set_aside) == sorted(
        f"data_{number}.ckpt" for number in (0, 7, 8, 9, 10, 11)
    )
    assert all("expected" in item.reason and "found" in item.reason for item in summary.set_aside)
    assert summary.findings["set_aside"] == 6
    assert len(StoreReader(tmp_path / "store")) == 5  # four whole ones, and the compressed one


def test_states_that_are_damaged_later_are_quarantined(
    verifier: Path, rows: list[Recorded], tokenizer_dir: Path, tmp_path: Path
) -> None:
    def no_number(states: torch.Tensor) -> torch.Tensor:
        states = states.clone()
        if len(states) == len(rows[3].token_ids):
            states[20, 1, 0] = float("nan")
        return states

    source = write_speculators(tmp_path / "files", rows, states=no_number)
    summary = imported(settings(verifier, tokenizer_dir, source, tmp_path / "store", "speculators", probe=False))
    (quarantined,) = summary.capture.quarantined
    assert (quarantined["dataset_index"], "finite" in quarantined["reason"]) == (3, True)
    assert len(StoreReader(tmp_path / "store")) == len(rows) - 1


def test_missing_masks_and_other_shapes_are_refused_by_name(
    verifier: Path, rows: list[Recorded], tokenizer_dir: Path, tmp_path: Path
) -> None:
    source = write_modelopt(tmp_path / "files", rows, masks=False)
    for changes, message in (
        ({}, "expected a loss mask, found none in the file: give --masks ROWS"),
        ({"masks": "all", "layers": (0, 1)}, r"expected --layers for the 3 auxiliary states .* found \[0, 1\]"),
        ({"masks": "all", "layers": (0, 1, 2, 3)}, "the last state is from after the final norm"),
        ({"masks": "all", "layers": (0, 1, 9)}, "expected blocks 0 to 3"),
        ({"masks": "all", "layers": ()}, "--layers: expected the blocks whose outputs modelopt's files hold"),
        ({"masks": "all", "peer": "eagle"}, "--from: expected one of"),
        ({"masks": "all", "source": tmp_path / "none"}, "expected a folder with files .pt, found none"),
        ({"masks": "all", "draft_vocab_size": None}, "expected --draft-vocab-size"),
    ):
        values: dict[str, Any] = {"peer": "modelopt", "source": source, **changes}
        with pytest.raises(InputError, match=message):
            imported(settings(verifier, tokenizer_dir, values.pop("source"), tmp_path / "store", **values))
    config = settings(verifier, tokenizer_dir, source, tmp_path / "store", "modelopt", masks="all")
    assert imported(config).findings["loss_masks"] == "every token, by --masks all"


def test_other_files_under_the_same_name_are_refused(
    verifier: Path, rows: list[Recorded], tokenizer_dir: Path, tmp_path: Path
) -> None:
    source = write_specforge(tmp_path / "files", rows)
    config = settings(verifier, tokenizer_dir, source, tmp_path / "store", "specforge", probe=False)
    imported(config)
    (source / "data_1.ckpt").unlink()
    with pytest.raises(InputError, match="files were changed, added or taken away since; give another --output"):
        imported(config)


@pytest.mark.parametrize("model_type", ["gemma", "fuyu", "cohere", "exaone"])
def test_head_norm_and_embeddings_are_the_loaded_models_or_refused(tmp_path: Path, model_type: str) -> None:
    """A norm of 1 + w with tied embeddings; a text model inside another; a scaled head; other names in the files."""
    save_tiny_model(model_type, tmp_path)
    cpu, dtype = torch.device("cpu"), torch.float32
    if model_type in ("cohere", "exaone"):
        with pytest.raises(InputError, match="may scale or cap" if model_type == "cohere" else "expected one tensor"):
            read_parts(tmp_path, dtype)
        return
    expected = parts_of(load_verifier(tmp_path, device=cpu, dtype=dtype, trust_remote_code=False))
    found = read_parts(tmp_path, dtype)
    assert torch.equal(found.embeddings.weight, expected.embeddings.weight)
    assert torch.equal(found.head.weight, expected.head.weight)
    assert torch.equal(found.norm.weight, expected.norm.weight)
    assert (found.norm.kind, found.norm.eps) == (expected.norm.kind, expected.norm.eps)
    assert (found.architecture, found.layers) == (expected.architecture, expected.layers)


def test_the_command_goes_on_after_sigkill(
    verifier: Path, rows: list[Recorded], tokenizer_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_speculators(tmp_path / "files", rows)
    command = [sys.executable, "-m", "draftcache.tools.cli", "import", source, "--from", "speculators", "--verifier",
               verifier, "--tokenizer", tokenizer_dir, "--layers", "0,1,2", "--masks", tmp_path / "files.masks.jsonl",
               "--draft-vocab-size", "100", "--top-k", "16", "--window", "20", "--mode", "float32",
               "--shard-tokens", "50", "--json", "--output", tmp_path / "cut"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "cut" / "commit").is_dir() or not committed_shards(open_storage(tmp_path / "cut")):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    capsys.readouterr()
    assert main([str(word) for word in command[3:]]) == 0
    assert json.loads(capsys.readouterr().out)["findings"]["last_state"] == "before"
    imported(settings(verifier, tokenizer_dir, source, tmp_path / "whole", "speculators"))
    ours, theirs = StoreReader(tmp_path / "cut"), StoreReader(tmp_path / "whole")
    assert len(ours) == len(theirs) == len(rows)
    for number in range(len(rows)):
        for name, values in theirs.read(number).arrays.items():
            assert np.array_equal(values, ours.read(number).arrays[name]), name
