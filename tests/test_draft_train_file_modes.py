"""Files of a store, a run and an exported draft have the mode that the umask gives to any new file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from draftcache.store.common.tensor_files import save_tensors
from support.imports import module_files
from support.training_runs import config, flags

WRITE_STORE = (
    "import sys; from pathlib import Path; from support.synthetic import write_store; write_store(Path(sys.argv[1]))"
)
ABOUT_THE_LIBRARY = {f"draftcache.tools.bench.parts.{name}" for name in ("store_content", "store_sample_formats")}
"""Benchmarks of the formats of others, whose files are deleted afterwards."""
ITSELF = "draftcache.store.common.tensor_files"


def run(umask: int, *words: str) -> None:
    subprocess.run([sys.executable, *words], check=True, capture_output=True, umask=umask, cwd=Path(__file__).parent)


@pytest.mark.parametrize(
    "umask", [0o027, pytest.param(0o022, marks=pytest.mark.slow), pytest.param(0o002, marks=pytest.mark.slow)]
)
def test_store_run_and_draft_follow_the_umask(tmp_path: Path, umask: int) -> None:
    settings = config(tmp_path, epochs=1)
    run(umask, "-c", WRITE_STORE, str(tmp_path / "store"))
    run(umask, "-m", "draftcache.tools.cli", "train", *flags(settings))
    export = ["--checkpoint", str(settings.output), "--output", str(tmp_path / "draft"), "--engine", "vllm"]
    run(umask, "-m", "draftcache.tools.cli", "export", *export)
    modes = {path.relative_to(tmp_path): path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert {"frozen.safetensors", "vocab_map.safetensors", "model.safetensors", "optimizer.safetensors"} <= {
        path.name for path in modes
    }
    assert not {path: oct(mode) for path, mode in modes.items() if mode != 0o666 & ~umask}


@pytest.mark.parametrize("tensors", [{"a": np.ones(3)}, {"a": torch.ones(3)}], ids=["numpy", "torch"])
def test_a_replaced_file_and_its_directory_hold_nothing_else(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    for _ in range(2):
        save_tensors(tmp_path / "a.safetensors", tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_all_safetensors_are_written_in_one_place() -> None:
    direct = {name for name, path in module_files().items() if "import save_file" in path.read_text(encoding="utf-8")}
    assert direct - {ITSELF} == ABOUT_THE_LIBRARY
