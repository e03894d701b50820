"""The kernels' own tests where there is no GPU: Triton's interpreter runs them on the CPU, in float32 and small shapes.

In processes of their own, as Triton reads TRITON_INTERPRET when it is imported; two, as one uses one core only.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from draftcache.store.common.triton_launch import INTERPRETED, runs_kernels, tl
from support.paths import ROOT

FORWARD = "test_capture_forward.py::test_random_weights_equal_the_models_code"
PARTS = (
    (("test_gpu_draft_attention.py", "test_gpu_block_pass.py"), 30),
    (
        (
            "test_gpu_draft_kernels.py",
            "test_gpu_block_kernels.py",
            "test_gpu_kernels.py",
            "test_kernels_interpreted.py",
            FORWARD,
        ),
        100,
    ),
)
"""What each process tests, and how many tests that is at least."""


@pytest.mark.skipif(tl is None, reason="needs Triton")
@pytest.mark.skipif(INTERPRETED, reason="is what starts the others")
def test_in_tritons_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    started = [
        subprocess.Popen(
            [*command, *(f"tests/{name}" for name in names)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for names, _ in PARTS
    ]
    ends = [(process.communicate()[0], process.returncode) for process in started]
    for (said, code), (_, least) in zip(ends, PARTS, strict=True):
        assert code == 0, said[-4000:]
        found = re.search(r"(\d+) passed", said)
        assert found is not None
        assert int(found[1]) > least, said[-400:]


@pytest.mark.skipif(not INTERPRETED, reason="of the interpreter's own process")
def test_kernels_and_not_their_twins_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from draftcache.capture.kernels import row_stats

    assert runs_kernels(torch.zeros(1))
    monkeypatch.setattr(row_stats, "row_stats_reference", None)
    assert int(row_stats.row_stats(torch.tensor([[1.0, 3.0, 2.0]])).argmax) == 1
