"""The scan's tiles: one per kernel, so that nothing is timed, and the same bits in every process."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from draftcache.capture.kernels import scan_tiles
from draftcache.capture.kernels.scan_tiles import fix_scan_tiles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or find_spec("mamba_ssm") is None, reason="needs a CUDA device and mamba-ssm"
    ),
    pytest.mark.filterwarnings("ignore"),
]
HEADS, WIDTH, GROUPS, STATE, CHUNK, LENGTH = 64, 64, 8, 128, 128, 1_000  # of Nemotron-Cascade-2-30B-A3B
ONE_PROCESS = "from test_gpu_scan_tiles import fixed_scan; print(fixed_scan())"


def fixed_scan(chunk: int = CHUNK) -> str:
    """Return the hash of a scan's output and final state, with the tiles of `scan_tiles`."""
    from draftcache.capture.verifier.ssm_precision import DT_LIMIT, stand_in_for_extension

    stand_in_for_extension()
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    fix_scan_tiles()
    made = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=made, device="cuda")

    x, dt = normal(1, LENGTH, HEADS, WIDTH).bfloat16(), (normal(1, LENGTH, HEADS) - 3).bfloat16()
    b, c = (normal(1, LENGTH, GROUPS, STATE).mul(0.3).bfloat16() for _ in range(2))
    out, final = mamba_chunk_scan_combined(
        x, dt, -torch.logspace(-3.5, 0.5, HEADS, device="cuda"), b, c, chunk_size=chunk, dt_softplus=True,
        dt_limit=DT_LIMIT, return_final_states=True,
    )  # fmt: skip
    assert out.isfinite().all()
    return hashlib.sha256(out.float().cpu().numpy().tobytes() + final.float().cpu().numpy().tobytes()).hexdigest()


def test_no_kernel_of_the_scan_is_timed() -> None:
    names = [(module, name) for module, tiles in scan_tiles._TILES.items() for name in tiles]
    kernels = [getattr(import_module(f"mamba_ssm.ops.triton.{module}"), name) for module, name in names]
    for kernel in kernels:
        kernel.cache.clear()
    assert fix_scan_tiles() == [name for _, name in names]
    fixed_scan()
    assert not any(kernel.cache for kernel in kernels)


def test_processes_compute_the_same_bits_and_another_order_of_sums_does_not() -> None:
    first, second = (
        subprocess.run([sys.executable, "-c", ONE_PROCESS], cwd="tests", capture_output=True, text=True, check=True)
        for _ in range(2)
    )
    found = fixed_scan()
    assert first.stdout.split()[-1] == second.stdout.split()[-1] == found
    # Other numbers of warps gave the same bits on an H200. A chunk of another length adds states up in other groups.
    assert fixed_scan(chunk=CHUNK // 2) != found
