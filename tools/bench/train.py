"""Draft training for the 30B verifier: hidden 2688, 32 / 2 heads, 32k of 131k tokens, window 4096, 6 unroll steps.

`python -m draftcache.tools.bench.train [--output FILE]` needs one GPU of 80 GB. `torchrun --nproc-per-node N -m
draftcache.tools.bench.train` compares N GPUs with one (case ddpN-32k, with one conversation of 32k on each GPU).
Batches are synthetic store rows. One step is forward, backward, clipping and AdamW, as in `draftcache train`; weights
are float32, products bf16.

- `tok_s` is the batch's tokens over the median of several steps, after two that are not counted.
- `peak_gib` is the most memory that PyTorch held at once in these steps.
- `matmul_share` is the operations per second of the needed matrix products and attention (without recomputation that
  saves memory) over those of a bf16 product, which is measured first.
- `matmul_ms` and the other times in ms, with --profile, are one more step's by kind of kernel.

The cases `dspark-` and `dflash-` train block drafts (parts/block_cases.py has their shape and their floors) with one
optimizer step per batch of the same kind. `anchor_s` are anchors per second; every token is one, except in
`dspark-32k-3072-anchors`, which has as many as the peer of train_peers. Before the first case of a draft is timed, the
gradients of its fused pass are compared with float64 autograd on a small batch: `gradient_error` is the largest
relative difference, and above 0.05 nothing is timed. Block drafts have one attention, whatever --attention says.

The case `loader-32k` trains from a lossless store that it writes to disk; `loader-32k-in-memory` is its second epoch.
`of_synthetic` is its rate as a share of `train-32k` of the same run; `disk_gb_s` is the rate of reading the store's
files without training. With `--attention triton,flash` each case is measured with both, one after the other; names of
the second kind end in -flash.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from draftcache.draft_train.ranks import joined_ranks
from draftcache.draft_train.setting_tables import CHOICES
from draftcache.store.common.errors import DraftcacheError, InputError
from draftcache.store.common.files import write_json
from draftcache.tools.bench.capture import matmul_ceiling
from draftcache.tools.bench.parts.block_cases import (
    BLOCK_CASES,
    LIMIT,
    gradient_error,
    needed_block_flops,
)
from draftcache.tools.bench.parts.stages import IDLE, REST, STAGES, stage_times
from draftcache.tools.bench.parts.train_cases import CASES, SHAPE, needed_flops, synthetic_batch
from draftcache.tools.bench.parts.train_loader import evaluation_metrics, loader_metrics, write_store
from draftcache.tools.bench.parts.train_steps import block_step, optimizer_step, timed_steps
from draftcache.tools.result_rows import report, result_row, some_of

LONG = 32_768
LOADER, LOADED = "loader-32k", 12
"""The name of the case that reads a store, and the number of its conversations."""
EVALUATION = "eval-32k"
"""The name of the case that evaluates on that store, after training on it."""
ATTENTION = CHOICES["attention"]
UNITS = {
    "tok_s": "tok/s", "median_tok_s": "tok/s", "peak_gib": "GiB", "matmul_share": "of bf16 matmul",
    "data_wait_share": "of wall time", "gb_s": "GB/s", "disk_gb_s": "GB/s", "of_synthetic": "of train-32k",
    "of_training": "of loader-32k-in-memory", "anchor_s": "anchors/s", "gradient_error": "relative",
    **dict.fromkeys((*STAGES, REST, IDLE), "ms"),
}  # fmt: skip
Metrics = dict[str, float]


def main() -> None:
    """Run the chosen cases and report their results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FILE")
    names = (*CASES, *BLOCK_CASES, LOADER)
    parser.add_argument("--cases", type=some_of(names), default=",".join(names), help="(%(default)s)")
    parser.add_argument(
        "--attention", type=some_of(ATTENTION), default=ATTENTION[0], help=f"of {', '.join(ATTENTION)} (%(default)s)"
    )
    parser.add_argument("--profile", action="store_true", help="say where the time of one more step goes")
    parser.add_argument("--directory", type=Path, help="for the store of loader-32k, 6 GB (default: a temporary one)")
    parser.add_argument("--peer-wheels", type=Path, metavar="DIRECTORY", help="time peers first: see train_peers")
    parser.add_argument("--peers", default="", metavar="NAME,NAME", help="which of them (all)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise InputError("expected a CUDA device, found none; this benchmark measures one")
    if "WORLD_SIZE" in os.environ:
        measure_ranks(arguments)
        return
    rows = peer_rows(
        arguments.peer_wheels, arguments.peers
    )  # the peers run before this process takes any of the GPU's memory
    device = torch.device("cuda")
    ceiling = matmul_ceiling(device)
    print(f"bf16 matmul {ceiling / 1e12:.0f} TFLOP/s", flush=True)
    for case, metrics in measure(arguments, device, ceiling):
        print(case, {key: round(value, 3) for key, value in metrics.items()}, flush=True)
        name = torch.cuda.get_device_name(device)
        rows += [result_row(case, metric, value, UNITS[metric], name) for metric, value in metrics.items()]
        if arguments.output:  # a run that is cut short leaves the results of its finished cases
            write_json(arguments.output, rows)
    report(rows, arguments.output)


def peer_rows(wheels: Path | None, peers: str) -> list[dict[str, Any]]:
    """Return the result rows of `train_peers`, which runs in another process.

    Importing the peers would change torch's settings in this one.
    """
    if wheels is None:
        return []
    with tempfile.TemporaryDirectory() as root:
        output = Path(root) / "peers.json"
        command = [
            sys.executable,
            "-m",
            "draftcache.tools.bench.train_peers",
            "--peer-wheels",
            str(wheels),
            "--output",
            str(output),
            *(["--peers", peers] if peers else []),
        ]
        subprocess.run(command, check=True)
        rows: list[dict[str, Any]] = json.loads(output.read_text())
    return rows


def measure(arguments: argparse.Namespace, device: torch.device, ceiling: float) -> Iterator[tuple[str, Metrics]]:
    """Yield each case's name and metrics, as they are measured. `ceiling` is the FLOP/s of a bf16 product."""
    synthetic: Metrics = {}
    checked: set[str] = set()
    for name in arguments.cases:
        if name == LOADER:
            yield from measure_loader(arguments, synthetic)
            continue
        if name in BLOCK_CASES:
            yield from measure_block(arguments, name, device, ceiling, checked)
            continue
        case = CASES[name]
        batch = synthetic_batch(case, device)
        for attention in arguments.attention:
            named = name + case_ending(attention)
            step = optimizer_step(device, lean=case.lean, attention=attention)
            seconds, peak = timed_steps(partial(step, batch))
            rate = sum(case.lengths) / seconds
            if name == "train-32k":
                synthetic[attention] = rate
            share = needed_flops(batch) / seconds / ceiling
            yield named, {"tok_s": rate, "peak_gib": peak / 2**30, "matmul_share": share}
            if arguments.profile:
                yield named, profiled(partial(step, batch))
            del step
            gc.collect()
            torch.cuda.empty_cache()
        del batch


def measure_block(
    arguments: argparse.Namespace, name: str, device: torch.device, ceiling: float, checked: set[str]
) -> Iterator[tuple[str, Metrics]]:
    """Yield the metrics of a block draft's case, after a check of its gradients if its draft is not in `checked`.

    Raises DraftcacheError where the gradients are not those of the plain pass.
    """
    case = BLOCK_CASES[name]
    if case.draft not in checked:
        error = gradient_error(case, device)
        yield f"{case.draft}-gradients", {"gradient_error": error}
        if not error <= LIMIT:  # NaN too
            raise DraftcacheError(
                f"{name}: expected gradients within {LIMIT} of those of the plain pass, found {error:.3g}; a pass that "
                "is wrong is not timed"
            )
        checked.add(case.draft)
    shape = case.shape()
    batch = synthetic_batch(case.batch, device, shape, shape.steps, text=True)
    step = block_step(case, device)
    seconds, peak = timed_steps(partial(step, batch))
    yield (
        name,
        {
            "tok_s": sum(case.batch.lengths) / seconds,
            "anchor_s": len(batch.start_index) / seconds,
            "peak_gib": peak / 2**30,
            "matmul_share": needed_block_flops(shape, batch) / seconds / ceiling,
        },
    )
    if arguments.profile:
        yield name, profiled(partial(step, batch))
    del step, batch
    gc.collect()
    torch.cuda.empty_cache()


def profiled(step: Callable[[], Any]) -> Metrics:
    """Return where the time of one more step goes, and print its longest kernels."""
    times, kernels = stage_times(step)
    for kernel, milliseconds, calls in kernels[:40]:
        print(f"{milliseconds:9.2f} ms {calls:5d}  {kernel[:150]}")
    return times


def measure_loader(arguments: argparse.Namespace, synthetic: Metrics) -> Iterator[tuple[str, Metrics]]:
    """Yield the metrics of training from a store, which is written once.

    `synthetic` holds the tok/s of train-32k by attention, if it was measured.
    """
    with tempfile.TemporaryDirectory(dir=arguments.directory) as root:
        store = Path(root) / "store"
        write_store(store, SHAPE, LONG, LOADED, torch.device("cuda"))
        for attention in arguments.attention:
            epochs = loader_metrics(store, Path(root) / attention, SHAPE, attention)
            for suffix, metrics in epochs.items():
                rate = synthetic.get(attention)
                compared = {"of_synthetic": metrics["tok_s"] / rate} if rate else {}
                yield LOADER + suffix + case_ending(attention), metrics | compared
        trained = epochs["-in-memory"]["tok_s"]
        metrics = evaluation_metrics(store, Path(root) / arguments.attention[-1], SHAPE)
        yield EVALUATION, metrics | {"of_training": metrics["tok_s"] / trained}


def case_ending(attention: str) -> str:
    """Return the ending of a case's name for an attention."""
    return "" if attention == ATTENTION[0] else f"-{attention}"


def measure_ranks(arguments: argparse.Namespace) -> None:
    """Measure, under torchrun, case ddp1-32k on each GPU by itself and ddp<N>-32k on all of them, in one run."""
    with joined_ranks("cuda") as ranks:
        batch, rows = synthetic_batch(CASES["train-32k"], ranks.device), []
        name = torch.cuda.get_device_name(ranks.device)
        for attention, world in product(arguments.attention, (1, ranks.world)):
            step = optimizer_step(ranks.device, ranks if world > 1 else None, attention=attention)
            seconds, peak = timed_steps(partial(step, batch))
            slowest = ranks.add_up(
                torch.nn.functional.one_hot(torch.tensor(ranks.rank), ranks.world).to(ranks.device) * seconds
            )
            metrics = {"tok_s": world * LONG / float(slowest.max()), "peak_gib": peak / 2**30}
            case = f"ddp{world}-32k{case_ending(attention)}"
            rows += [result_row(case, metric, value, UNITS[metric], name) for metric, value in metrics.items()]
            del step
            gc.collect()
            torch.cuda.empty_cache()
        if ranks.leads:
            report(rows, arguments.output)


if __name__ == "__main__":
    main()
