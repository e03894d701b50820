"""How a training step's time on a GPU is divided between kinds of kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

STAGES = {
    "attention_ms": (
        "_attend_kernel", "_query_gradient_kernel", "_key_gradient_kernel", "_merge_diagonal_kernel", "FlashAttention",
        "flash_bwd", "_add_parts_kernel",
    ),
    "loss_ms": ("_tail_kl_kernel", "_ce_l1_kernel"),
    "norm_swiglu_ms": ("_rms_norm", "_swiglu", "_split_normed", "_normed_gradient"),
    "matmul_ms": ("nvjet", "gemm", "cutlass", "splitK"),
    "optimizer_ms": ("multi_tensor_apply", "FusedOptimizer"),
}  # fmt: skip
"""Parts of kernels' names by metric. A kernel counts for the first metric that has a part of its name."""
REST, IDLE = "other_kernels_ms", "idle_ms"


def stage_times(step: Callable[[], Any]) -> tuple[dict[str, float], list[tuple[str, float, int]]]:
    """Run one step and return its milliseconds by stage, and (kernel, milliseconds, calls) with the longest first."""
    from torch.autograd import DeviceType  # type: ignore[attr-defined]
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    found = [event for event in trace.events() if event.device_type == DeviceType.CUDA]
    spans = [(event.time_range.start, event.time_range.end) for event in found]
    times = dict.fromkeys((*STAGES, REST), 0.0)
    kernels: dict[str, tuple[float, int]] = {}
    for event, (first, last) in zip(found, spans, strict=True):
        stage = next((name for name, parts in STAGES.items() if any(part in event.name for part in parts)), REST)
        times[stage] += (last - first) / 1e3
        total, calls = kernels.get(event.name, (0.0, 0))
        kernels[event.name] = (total + (last - first) / 1e3, calls + 1)
    whole = (max(last for _, last in spans) - min(first for first, _ in spans)) / 1e3
    times[IDLE] = max(0.0, whole - sum(times.values()))
    return times, sorted(((name, *held) for name, held in kernels.items()), key=lambda item: -item[1])
