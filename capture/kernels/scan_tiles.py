"""Fixed tiles for mamba-ssm's scan kernels, so that all processes compute the same bits.

mamba-ssm lets Triton time several tiles in every process and take the fastest one, and timings differ from run to run.
Two tiles may add up in another order: so two workers, or a killed worker and the one that resumes its job, wrote states
of the same conversation that differed in their last bits. With one tile per kernel nothing is timed, so a process also
begins sooner. mamba-ssm's own deterministic mode is no way to that: it is chosen by environment variables before
the import, since 2.3 only, and takes the smallest tile of each kernel.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PACKAGE = "mamba_ssm.ops.triton"
_Tile = tuple[dict[str, int], int]
"""Sizes of a block by the kernel's names for them, and the warps that compute it."""
_TILES: dict[str, dict[str, _Tile]] = {
    "ssd_chunk_state": {
        "_chunk_cumsum_fwd_kernel": ({"BLOCK_SIZE_H": 16}, 4),
        "_chunk_state_fwd_kernel": ({"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 32}, 4),
    },
    "ssd_state_passing": {"_state_passing_fwd_kernel": ({"BLOCK_SIZE": 256}, 4)},
    "ssd_bmm": {"_bmm_chunk_fwd_kernel": ({"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32}, 4)},
    "ssd_chunk_scan": {"_chunk_scan_fwd_kernel": ({"BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32}, 2)},
}
"""A tile by module and kernel: of those in mamba-ssm's lists the one that took the least time on an H200, in bfloat16
with 32k tokens, chunks of 128, 64 heads of 64 channels and states of 128. With the stages below they take at most 100
KB of shared memory, in float32 too."""
_STAGES = 4


def fix_scan_tiles() -> list[str]:
    """Give every kernel of the scan's forward its one tile, and return the names of those that have it.

    A kernel that another version of mamba-ssm has under another name, or with other parameters, keeps its own choice.
    """
    return [
        name
        for module, tiles in _TILES.items()
        for name, tile in tiles.items()
        if _fix(getattr(import_module(f"{_PACKAGE}.{module}"), name, None), tile)
    ]


def _fix(kernel: Any, tile: _Tile) -> bool:
    """Replace the configurations of Triton's autotuner `kernel` by one; returns whether it is one, with this tile."""
    from triton import Config
    from triton.runtime.autotuner import Autotuner

    sizes, warps = tile
    if not isinstance(kernel, Autotuner) or not sizes.keys() <= set(kernel.arg_names):
        return False
    kernel.configs = [Config(sizes, num_warps=warps, num_stages=_STAGES)]
    return True
