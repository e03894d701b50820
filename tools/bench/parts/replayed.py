"""The time of work that is the same in every call: on a GPU replayed from a CUDA graph, so launches cost nothing."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from draftcache.tools.bench.parts.stages import IDLE, stage_times

GRAPH, KERNELS, HOST = "CUDA graph", "sum of its kernels", "host clock"
"""How a time was measured."""
_RUNS, _FLUSHED_BYTES = 25, 256 << 20


def timed_ms(function: Callable[[], Any], device: torch.device) -> tuple[float, str]:
    """Return the median milliseconds of a function, and how they were measured.

    On a GPU the work is replayed from a CUDA graph. Before every replay the GPU's L2 cache is overwritten, as another
    model would do. Where a graph can't hold it, the times of its kernels are summed, without what lies between them.
    The function must do the same work whenever it is called.
    """
    for _ in range(3):
        function()
    if device.type != "cuda":
        return statistics.median(_host_ms(function) for _ in range(5)), HOST
    torch.cuda.synchronize(device)
    graph = captured(function)
    if graph is None:
        times, _ = stage_times(function)
        return sum(value for name, value in times.items() if name != IDLE), KERNELS
    flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=device)
    return statistics.median(_replay_ms(graph, flushed) for _ in range(_RUNS)), GRAPH


def captured(function: Callable[[], Any]) -> torch.cuda.CUDAGraph | None:
    """Return a CUDA graph of the function's work, or None where none can hold it."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.cuda.graph(graph):
            function()
    except Exception as exc:  # whatever the code of a model does that a graph can't hold
        print(f"no CUDA graph: {type(exc).__name__}: {str(exc)[:160]}", file=sys.stderr, flush=True)
        torch.cuda.synchronize()
        return None
    return graph


def _replay_ms(graph: torch.cuda.CUDAGraph, flushed: torch.Tensor) -> float:
    flushed.zero_()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    first.record()
    graph.replay()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last))


def _host_ms(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - started)
