"""What `size` knows beside a dataset: counts without one, what other projects store, and the rates of GPUs."""

from __future__ import annotations

import numpy as np

from draftcache.capture.job.store_size import Counts, shard_numbers
from draftcache.store.common.errors import InputError


def guess_counts(tokens: int, loss_fraction: float, mean_length: int, shard_tokens: int) -> Counts:
    """Return counts without a dataset: equal lengths, every row kept, a teacher at every loss token (an upper bound).

    Raises InputError for values out of range.
    """
    if tokens < 1 or mean_length < 1 or not 0 <= loss_fraction <= 1:
        raise InputError(
            "expected --tokens and --mean-length of at least 1 and --loss-fraction in 0 .. 1, "
            f"found {tokens}, {mean_length} and {loss_fraction}"
        )
    edges = np.linspace(0, tokens, max(1, round(tokens / mean_length)) + 1).round()
    lengths = np.diff(edges)
    return Counts(
        tokens=lengths,
        rows=lengths,
        teacher=lengths * loss_fraction,
        shard=shard_numbers([lengths], shard_tokens),
        loss_tokens=round(tokens * loss_fraction),
        basis=f"guess: conversations of {mean_length:,} tokens, every row in reach, a teacher at every loss token "
        "(upper bounds: give --dataset for the real ones)",
    )


def peer_bytes(tokens: int, taps: int, hidden_size: int) -> dict[str, int]:
    """Return the bytes of other projects' stores by project, from the formulas of their formats.

    They hold taps and last state in bf16 for every token, int64 ids, and in SpecForge's case an int64 mask.
    """
    states = 2 * (taps + 1) * hidden_size
    return {"SpecForge": tokens * (states + 16), "speculators": tokens * (states + 8)}


GPU_TFLOPS = {"h100": 798.0, "h200": 798.0, "a100": 252.0}
"""Ceilings of bf16 matrix products in TFLOP/s. The H100's was measured on random data; the H200 has the same die and
gets the same number; the A100's is its datasheet's 312 times the share of the datasheet (989) that the H100 reached."""
OWN_FORWARD_SHARE = 0.69
"""Share of the ceiling that draftcache's forward reaches: 66.3k tok/s x 8.1 GFLOP (30B-A3B NemotronH, 32k tokens, one
H100; `draftcache.tools.bench.capture`)."""
PLAIN_FORWARD_SHARE = 0.39
"""Share of the ceiling that transformers' code reaches: 38.2k tok/s x 8.1 GFLOP, otherwise as above."""
