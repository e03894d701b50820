"""The scaling benchmark: its figures are what they say, and all of it runs on two CPU workers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from draftcache.capture.verifier.load import load_verifier
from draftcache.tools.bench import scale
from draftcache.tools.bench.parts.scale_capture import equal_share, worker_rate
from draftcache.tools.bench.parts.scale_checkpoint import write_checkpoint
from draftcache.tools.bench.parts.scale_picture import by_count, draw
from draftcache.tools.bench.parts.scale_shapes import SHAPES, mixed_lengths, turns_mask
from draftcache.tools.bench.parts.scale_waiting import loss_difference, step_figures


def test_the_lengths_and_masks_are_those_that_the_docstring_names() -> None:
    lengths = mixed_lengths(32_768, count=2000)
    assert min(lengths) >= 30
    assert max(lengths) <= 32_768
    assert np.mean(lengths) == pytest.approx(14_000, rel=0.03)
    assert len(mixed_lengths(32_768, count=7)) == 7
    assert sum(mixed_lengths(400, tokens=6000)) - 6000 in range(400)
    assert turns_mask(32_768).mean() == pytest.approx(0.48, abs=0.001)


def test_the_checkpoint_is_whole_and_has_a_tensor_per_expert(tmp_path: Path) -> None:
    shape = SHAPES["small"]
    size = write_checkpoint(tmp_path / "model", shape.verifier(), "cpu", shape.file_bytes)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == size
    assert len(set(index["weight_map"].values())) > 1
    assert sum("experts.3.up_proj" in name for name in index["weight_map"]) == 2
    load_verifier(tmp_path / "model", device=torch.device("cpu"), dtype=torch.float32, trust_remote_code=False)


def test_a_workers_rate_leaves_out_its_ramp_and_its_last_commit() -> None:
    """10 tokens/s in the middle; three slow shards at the beginning, and a last one that follows at once."""
    times = [20.0, 40.0, 60.0, *(60.0 + number for number in range(1, 9)), 68.0]
    commits = [[time, 10] for time in times]
    assert worker_rate(0.0, commits) == pytest.approx(10.0)
    assert worker_rate(0.0, commits[:4]) == pytest.approx(40 / 61)
    assert worker_rate(0.0, []) == 0.0


def test_waiting_is_counted_against_the_slowest_rank_of_each_step() -> None:
    step = {"tokens": 30, "tokens_per_second": 10.0, "data_wait_share": 0.5}
    reports = [
        {"computed": [9.0, 1.0, 3.0], "ends": [10.0, 13.0, 16.0], "steps": [step] * 3},
        {"computed": [1.0, 3.0, 3.0], "ends": [10.0, 13.0, 16.0]},
    ]
    metrics, waited = step_figures(reports, 1)
    assert waited == 2.0
    assert metrics == {"tok_s": 10.0, "waiting_share": 2 / 12, "data_wait_share": 0.5}


def test_what_is_wrong_is_said() -> None:
    assert loss_difference([2.0, 4.0], [2.0, 5.0]) == pytest.approx(0.2)
    files = {0: {"/a": "1"}, 1: {"/a": "2"}}
    assert equal_share(files, files) == 1.0
    assert equal_share({0: files[0], 1: {"/a": "3"}}, files) == 0.5
    assert equal_share({}, files) == 0.0
    values = {"equal_shards": 1.0, "damages": 0.0, "loss_difference": 1e-5, "tok_s": 7.0}
    rows = [{"case": "c", "metric": metric, "value": value} for metric, value in values.items()]
    assert not scale._wrong(rows)
    for number, value in enumerate((0.5, 1.0, float("nan"))):
        rows[number]["value"] = value
        assert len(scale._wrong(rows)) == number + 1


def test_the_picture_has_both_parts(tmp_path: Path) -> None:
    values = [("capture-1", "efficiency", 1.0), ("capture-4", "efficiency", 0.97), ("train-1", "efficiency", 1.0)]
    values += [("capture-1", "tok_s", 1.0), ("capture-4", "tok_s", 4.0), ("capture-tp2", "efficiency", 0.5)]
    values += [("train-4", "waiting_share", 0.05), ("train-4-shuffled", "waiting_share", 0.4)]
    rows = [{"case": case, "metric": metric, "value": value} for case, metric, value in values]
    assert by_count(rows, r"capture-(\d+)", "efficiency") == {1: 1.0, 4: 0.97}
    draw(rows, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_all_of_it_on_two_cpu_workers(tmp_path: Path) -> None:
    output = tmp_path / "rows.json"
    command = [
        sys.executable, "-m", "draftcache.tools.bench.scale", "--shape", "small", "--device", "cpu", "--gpus", "1,2",
        "--work", str(tmp_path), "--output", str(output), "--plot", str(tmp_path / "scale.png"),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "worker 1 ended early: exit code -9" in done.stderr
    found = {(row["case"], row["metric"]): row["value"] for row in json.loads(output.read_text())}
    cases = {case for case, _ in found}
    expected = {"load-1", "load-2", "load-2-through-host", "capture-1", "capture-2", "kill-2", "capture-tp2"}
    assert cases == expected | {"train-1", "train-1-shuffled", "train-2", "train-2-shuffled"}
    assert 0 < found["capture-2", "start_s"] < 60
    assert found["kill-2", "equal_shards"] == 1.0
    assert found["kill-2", "damages"] == 0.0
    assert found["kill-2", "verified_share"] == 1.0
    assert found["train-2", "loss_difference"] < 1e-5
    assert 0 < found["train-2", "waiting_share"] < found["train-2-shuffled", "waiting_share"] < 1
    assert {path.name for path in tmp_path.iterdir()} == {"rows.json", "scale.png"}
