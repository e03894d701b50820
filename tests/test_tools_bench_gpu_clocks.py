"""Clocks and power beside a benchmark, read from a real process in nvidia-smi's place."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from draftcache.tools.bench.parts import gpu_clocks
from draftcache.tools.bench.parts.gpu_clocks import GpuClocks

SCRIPT = """#!/bin/sh
echo "$@" > "$0.asked"
while true; do
  echo "0, 1500, 690.5"
  echo "1, 1900, [N/A]"
  echo "2, 1700, 650.5"
  sleep 0.02
done
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "nvidia-smi"
    path.write_text(SCRIPT)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return path


def test_means_are_of_the_chosen_gpus_and_times(smi: Path) -> None:
    with GpuClocks() as clocks:
        first = time.time()
        deadline = first + 20
        while not clocks.means(first, deadline, [0, 2]):
            assert time.time() < deadline
            time.sleep(0.01)
        time.sleep(0.1)
        last = time.time()
    assert clocks.means(first, last, [0]) == {"sm_clock_mhz": 1500.0, "power_w": 690.5}
    both = clocks.means(first, last, [0, 2])
    assert 1590 < both["sm_clock_mhz"] < 1610
    assert both["power_w"] == pytest.approx(670.5, abs=3)
    assert clocks.means(first, last, [1]) == {}  # it says no power
    assert clocks.means(first - 9, first - 8, [0]) == {}
    assert Path(f"{smi}.asked").read_text().split() == list(gpu_clocks._COMMAND[1:])
    assert clocks._process.returncode == -9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpus_own_clock_is_read() -> None:
    with GpuClocks() as clocks:
        first = time.time()
        time.sleep(3)
    found = clocks.means(first, time.time(), [0])
    assert 100 < found["sm_clock_mhz"] < 5000
    assert 10 < found["power_w"] < 2000
