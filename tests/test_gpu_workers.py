"""Captures on a GPU that is not the first one: every GPU and every number of workers write the same bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from draftcache.tools.bench.parts.scale_capture import Hashes, shard_hashes
from support.capture_jobs import config, flags, prepare_rows, write_rows
from support.paths import DEMO

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    root = tmp_path_factory.mktemp("dataset")
    return prepare_rows(root / "prepared", tokenizer_dir, write_rows(root / "rows.jsonl", rows=24))


def captured(dataset: Path, output: Path, **changes: Any) -> Hashes:
    """Capture the demo's verifier in a process of its own, and return the hashes of the shards' files."""
    settings = config(DEMO, dataset, output, layers=(2, 5, 10), allow_fallback=True, **changes)
    command = [sys.executable, "-m", "draftcache.tools.cli", "capture", *flags(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return shard_hashes(output)


def test_every_gpu_and_two_workers_write_the_same_bits(tmp_path: Path, dataset: Path) -> None:
    first = captured(dataset, tmp_path / "first", device="cuda:0")
    assert captured(dataset, tmp_path / "second", device="cuda:1") == first
    assert captured(dataset, tmp_path / "both", device="auto", workers=2) == first
    other = captured(dataset, tmp_path / "float32", device="cuda:1", compute_dtype="float32")
    assert other.keys() == first.keys()
    assert other != first  # the comparison could fail
