"""Capture at the 30B verifier's shape: the model's own forward, ours, and whole capture to disk, in one run.

`python -m draftcache.tools.bench.capture [--output FILE]` needs one GPU of 80 GB and mamba-ssm. Weights are random and
made on the GPU, so that times are right and values mean nothing. The case `hf-forward-32k` is the model's own code with
the same scan kernels. `forward-32k` and `prefill-256k` are our forward without head, teacher and copies. `capture-32k`
and `capture-mixed` are the work of `draftcache capture` from token ids to committed shards, in mode lossless; names
with `-int8` are in that mode, and names with `-memory` write into memory (--memory), which shows what the disk costs.

- `tok_s` is tokens over wall time: the median of several runs after one that is not counted. Captures run once, after
  a shorter one whose kernels are traced for `gpu_idle_share`.
- `matmul_share` is the operations per second of matrix products and attention over those of a bf16 product, which is
  measured first.
- `gpu_idle_share` is the share of a capture's wall time in which no kernel ran, `gb_s` the bytes of the committed
  shards per second.
- Mixed lengths are 30 to 32,768 tokens, 14k in the mean; 48 % of the tokens carry loss.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from draftcache.capture.verifier.forward import Forward, PlainForward
from draftcache.capture.verifier.load import Verifier, find_modules
from draftcache.capture.verifier.ssm_precision import mamba_mixers, scan_implementation
from draftcache.store.common.errors import InputError
from draftcache.store.common.files import write_json
from draftcache.tools.bench.parts.capture_job import CaptureRun, run_capture
from draftcache.tools.bench.parts.scale_shapes import mixed_lengths
from draftcache.tools.bench.parts.verifier_shape import LAYERS, random_verifier, verifier_config
from draftcache.tools.result_rows import report, result_row, some_of

LONG = 32_768
CASES = (
    "hf-forward-32k", "forward-32k", "capture-32k", "capture-32k-memory", "capture-32k-int8", "capture-32k-int8-memory",
    "capture-mixed", "capture-mixed-memory", "prefill-256k",
)  # fmt: skip
_TRACED = 20 * LONG
_BODY_FLOPS, _ATTENTION_FLOPS_PER_TOKEN, _HEAD_FLOPS = 5.75e9 + 0.08e9, 49_152.0, 0.70e9
"""Operations per token; attention's grow with the length, as `matmul_flops` computes."""
UNITS = {
    "tok_s": "tok/s",
    "peak_gb": "GB",
    "matmul_share": "of bf16 matmul",
    "gpu_idle_share": "of wall",
    "gb_s": "GB/s",
}

Metrics = dict[str, float]


def main() -> None:
    """Run the chosen cases and report their results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--cases", type=some_of(CASES), default=",".join(CASES), help="(%(default)s)")
    parser.add_argument("--work", type=Path, metavar="DIRECTORY", help="where stores are written (a temporary one)")
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"), metavar="DIRECTORY", help="(%(default)s)")
    parser.add_argument("--tokens", type=int, default=80 * LONG, help="tokens per capture (%(default)s)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise InputError("expected a CUDA device, found none; this benchmark measures one")
    device = torch.device("cuda")
    ceiling = matmul_ceiling(device)
    print(f"bf16 matmul {ceiling / 1e12:.0f} TFLOP/s", flush=True)
    verifier = find_modules(random_verifier(verifier_config(), device), device)
    print("scan:", scan_implementation(mamba_mixers(verifier.model)[0]), flush=True)
    rows = []
    name = torch.cuda.get_device_name(device)
    for case, metrics in measure(verifier, ceiling, arguments):
        print(case, {key: round(value, 3) for key, value in metrics.items()}, flush=True)
        rows += [result_row(case, metric, value, UNITS[metric], name) for metric, value in metrics.items()]
        if arguments.output:  # a run that is cut short leaves the results of its finished cases
            write_json(arguments.output, rows)
    report(rows, arguments.output)


def measure(verifier: Verifier, ceiling: float, arguments: argparse.Namespace) -> Iterator[tuple[str, Metrics]]:
    """Yield each case's name and metrics, as they are measured. `ceiling` is the FLOP/s of a bf16 product."""
    ids = torch.randint(0, verifier.vocab_size, (1, 8 * LONG), device=verifier.device)
    kernel_seconds: dict[str, float] = {}
    for name in arguments.cases:
        if name == "hf-forward-32k":
            plain = PlainForward(verifier.body, verifier.blocks, verifier.final_norm)
            yield name, forward_metrics(plain, ids[:, :LONG], ceiling, runs=3)
        elif name == "forward-32k":
            yield name, forward_metrics(verifier.body_forward, ids[:, :LONG], ceiling, runs=7)
        elif name == "prefill-256k":
            yield name, forward_metrics(verifier.body_forward, ids, ceiling, runs=1)
        else:
            lengths = _mixed_lengths if "mixed" in name else fixed_lengths
            mode = "int8" if "int8" in name else "lossless"
            with TemporaryDirectory(dir=arguments.memory if name.endswith("-memory") else arguments.work) as root:
                kind = name.removesuffix("-memory")
                if kind not in kernel_seconds:  # the kernels do the same wherever the store is written
                    traced = run_capture(verifier, lengths(_TRACED), Path(root) / "traced", mode, trace=True)
                    rmtree(Path(root) / "traced")
                    kernel_seconds[kind] = traced.kernel_seconds / sum(traced.lengths)
                run = run_capture(verifier, lengths(arguments.tokens), Path(root) / "store", mode)
            yield name, capture_metrics(run, kernel_seconds[kind], ceiling)


def fixed_lengths(tokens: int) -> list[int]:
    """Return the lengths of conversations of 32,768 tokens each, about `tokens` in all and at least one."""
    return [LONG] * max(1, tokens // LONG)


def _mixed_lengths(tokens: int) -> list[int]:
    return mixed_lengths(LONG, tokens=tokens)


def matmul_flops(length: float) -> float:
    """Return the operations per token of a causal forward of `length` tokens, without the head."""
    return _BODY_FLOPS + _ATTENTION_FLOPS_PER_TOKEN * length


def forward_metrics(forward: Forward, ids: Tensor, ceiling: float, runs: int) -> Metrics:
    """Measure the forward of one conversation (ids [1, L]) that keeps none of the states."""

    def once() -> None:
        for _ in forward.prefill(ids, LAYERS, LONG):
            pass

    once()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    rate = ids.shape[1] / statistics.median(timed(once) for _ in range(runs))
    return {
        "tok_s": rate,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
        "matmul_share": rate * matmul_flops(ids.shape[1]) / ceiling,
    }


def capture_metrics(run: CaptureRun, kernel_seconds_per_token: float, ceiling: float) -> Metrics:
    """Return the metrics of a capture.

    `kernel_seconds_per_token` comes from a shorter, traced capture of the same kind, because tracing slows a capture.
    """
    lengths = np.array(run.lengths, np.float64)
    flops = float((lengths * [matmul_flops(length) for length in lengths]).sum()) + _HEAD_FLOPS * run.teacher_rows
    return {
        "tok_s": float(lengths.sum()) / run.seconds,
        "peak_gb": run.peak_bytes / 1e9,
        "matmul_share": flops / run.seconds / ceiling,
        "gpu_idle_share": max(0.0, 1 - kernel_seconds_per_token * sum(run.lengths) / run.seconds),
        "gb_s": run.bytes_written / run.seconds / 1e9,
    }


def matmul_ceiling(device: torch.device) -> float:
    """Return the FLOP/s of a bf16 product of random 8192 x 8192 matrices."""
    left, right = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(5):
        left @ right
    torch.cuda.synchronize()
    seconds = statistics.median(timed(lambda: [left @ right for _ in range(10)]) for _ in range(5)) / 10
    return float(2 * 8192**3 / seconds)


def timed(function: Callable[[], Any]) -> float:
    """Return the seconds that `function` takes, with the work that it leaves to the device."""
    started = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
