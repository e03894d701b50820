"""Capture, loading and draft training on 1, 2, 4, ... GPUs of one machine, at the 30B verifier's shape.

`python -m draftcache.tools.bench.scale [--output FILE] [--plot FILE]` needs GPUs of 80 GB, mamba-ssm, and 65 GB and 22
GB per GPU of room in --work, by default memory. Weights, ids and states are random. Work grows with the GPUs: N have N
times the tokens of one. `--shape small --device cpu` runs all of it on two cores, to see that it works. The parts:

- `load`, cases `load-N`: N processes load the checkpoint at the same time. `seconds` until all hold the weights, from
  the processes' start; `load_s` is the slowest one's loading alone, `gb_s` the weights of all over that, `host_gb` the
  most private host memory that one of them took. `load-N-through-host` is the former way, for the largest N.
- `capture`, cases `capture-N`: the N workers of `draftcache capture --workers N` on one store, mode lossless, shards of
  65,536 tokens, lengths of 30 to 32,768 (14k in the mean), 48 % of the tokens with loss. `tok_s` is the sum of the
  workers' rates between their own commits, without the first quarter and the last of each one's shards. Loading,
  checks, calibration and the end, where a worker finds no further shard, are no part of it. `job_tok_s` has that end:
  all tokens over the time from the first worker's first conversations to the last commit. `imbalance` is (latest -
  mean) of the workers' last commits over that time; `gb_s` (committed bytes), `sm_clock_mhz` and `power_w` (means of
  its GPUs, the first N that nvidia-smi lists) are over it too. `write_wait_share` is the share of the workers' time for
  which their GPUs waited for compression and files. `start_s` pass before the last worker begins.
- `kill`, case `kill-N`, for the largest N: the last worker is killed by SIGKILL when half of the tokens are committed.
  `tok_s` is by the job's time, as `job_tok_s`; `efficiency` compares tokens per second of a living worker with those of
  the same capture without a kill. `equal_shards` is the share of shards whose files have the same hashes as without,
  `verified_share` the share that was read in full, `damages` what was found.
- `tensor-parallel`, cases `capture-tpK`: one worker over K of 1, 2 and 4 GPUs, the tokens of one GPU. It needs
  transformers 5.23. The rate of one GPU is that of `capture-tp1`, which is left out where `capture-1` was measured.
- `train`, cases `train-N` and `train-N-shuffled`: `draftcache train` by torchrun on 48 conversations per rank, one per
  rank and step, in bucketed and in shuffled order. `waiting_share` is the share of the ranks' time in which they wait
  for the slowest (parts/scale_waiting.py has the formula), `wait_removed` is how much of it bucketing removes, and
  `loss_difference` the largest relative difference of a step's loss to the fewest ranks', on the same conversations.
`efficiency` is the rate of N GPUs over N times that of one; `job_efficiency` is the same of `job_tok_s`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from shutil import disk_usage
from tempfile import TemporaryDirectory
from typing import Any

import torch

from draftcache.store.common.errors import DraftcacheError, InputError
from draftcache.store.common.files import write_json
from draftcache.tools.bench.parts.scale_capture import CaptureOutcome, Captures, equal_share
from draftcache.tools.bench.parts.scale_checkpoint import entry_bytes, published_tensors, write_checkpoint
from draftcache.tools.bench.parts.scale_load import WAYS, load_metrics
from draftcache.tools.bench.parts.scale_picture import by_count, draw
from draftcache.tools.bench.parts.scale_shapes import SHAPES
from draftcache.tools.bench.parts.scale_store import training_lengths
from draftcache.tools.bench.parts.scale_waiting import LOSS_LIMIT, ORDERS, Trainings, loss_difference
from draftcache.tools.result_rows import cpu_name, report, result_row, some_of

PARTS = ("load", "capture", "kill", "tensor-parallel", "train")
UNITS = {
    "tok_s": "tok/s", "job_tok_s": "tok/s", "gb_s": "GB/s", "seconds": "s", "load_s": "s", "start_s": "s",
    "host_gb": "GB", "imbalance": "of the time", "write_wait_share": "of worker time", "efficiency": "of N x one",
    "job_efficiency": "of N x one", "of_undisturbed": "of the rate", "equal_shards": "of the shards",
    "verified_share": "of the shards", "damages": "", "waiting_share": "of rank time",
    "wait_removed": "of the wait", "data_wait_share": "of wall time", "loss_difference": "relative",
    "sm_clock_mhz": "MHz", "power_w": "W",
}  # fmt: skip
_ALLOWED = {"equal_shards": (1.0, 1.0), "damages": (0.0, 0.0), "loss_difference": (0.0, LOSS_LIMIT)}
"""Least and largest value of the metrics that say whether results are right."""
_KILL_AFTER = 0.5
_SPLITS = (1, 2, 4)
"""Over how many GPUs a worker's verifier is split."""
_MOST_OF_MEMORY = 0.85
"""Share of host memory that models in it may take."""
_BYTES_PER_TOKEN = 12_000  # of a store, about
Metrics = dict[str, float]
Case = tuple[str, Metrics]


def main() -> None:
    """Run the chosen parts and report their results; exit code 1 where a store or a loss is not what it has to be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG of all rows, those of --rows too")
    parser.add_argument("--rows", type=Path, nargs="*", default=[], metavar="FILE", help="rows of earlier runs to keep")
    parser.add_argument(
        "--parts", type=some_of((*PARTS, "none")), default=",".join(PARTS), help="(%(default)s); none: rows only"
    )
    parser.add_argument("--gpus", type=_counts, metavar="N,N", help="(powers of two up to the GPUs there are)")
    parser.add_argument("--work", type=Path, default=Path("/dev/shm"), metavar="DIRECTORY", help="(%(default)s)")
    parser.add_argument("--shape", choices=list(SHAPES), default="30b", help="(%(default)s)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="(%(default)s)")
    parser.add_argument("--tokens", type=int, help="tokens per GPU of a capture (1,800,000; small: 6,000)")
    parser.add_argument("--checkpoint", type=Path, metavar="DIRECTORY", help="capture this model of the shape instead")
    arguments = parser.parse_args()
    arguments.gpus = arguments.gpus or _powers(arguments.device)
    rows = [row for path in arguments.rows for row in json.loads(path.read_text(encoding="utf-8"))]
    if arguments.parts != ["none"]:
        _require_means(arguments)
        rows = _measured(arguments, rows)
    report(rows, arguments.output)
    if arguments.plot:
        draw(rows, arguments.plot)
    if wrong := _wrong(rows):
        sys.exit(f"draftcache.tools.bench.scale: error: {'; '.join(wrong)}")


def _measured(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run the parts, and return the rows with theirs in the place of older ones."""
    started = time.monotonic()
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else cpu_name()
    with TemporaryDirectory(dir=arguments.work, prefix="draftcache-scale-") as root:
        print(f"stores and checkpoint: {_kind_of_place(Path(root))}", flush=True)
        for case, metrics in _Scale(arguments, Path(root), rows).cases():
            values = {name: round(value, 4) for name, value in metrics.items()}
            print(f"[{time.monotonic() - started:.0f} s] {case}", values, flush=True)
            rows = [row for row in rows if row["case"] != case]
            rows += [result_row(case, name, value, UNITS[name], device) for name, value in metrics.items()]
            if arguments.output:  # a run that is cut short leaves the results of its finished cases
                write_json(arguments.output, rows)
    return rows


class _Scale:
    """The parts of one run."""

    def __init__(self, arguments: argparse.Namespace, root: Path, rows: list[dict[str, Any]]) -> None:
        self._arguments, self._root = arguments, root
        self._shape = SHAPES[arguments.shape]
        self._counts: list[int] = arguments.gpus
        self._single: dict[str, float] = {}
        for metric in ("tok_s", "job_tok_s"):
            if 1 in (known := by_count(rows, r"capture-(\d+)", metric)):
                self._single[metric] = known[1]
        self._outcomes: dict[int, CaptureOutcome] = {}

    def cases(self) -> Iterator[Case]:
        """Yield each case's name and metrics, as they are measured."""
        parts = self._arguments.parts
        if set(parts) & {"load", "capture", "kill", "tensor-parallel"}:
            model = self._arguments.checkpoint or self._root / "model"
            if self._arguments.checkpoint is None:
                write_checkpoint(model, self._shape.verifier(), self._arguments.device, self._shape.file_bytes)
            size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
            print(f"checkpoint: {size / 1e9:.1f} GB", flush=True)
            tokens = self._arguments.tokens or self._shape.capture_tokens
            captures = Captures(self._root, model, self._shape, self._arguments.device, tokens)
            if "load" in parts:
                yield from self._load(model, size)
            if "capture" in parts:
                for count in self._counts:
                    yield from self._capture(captures, count)
            if "kill" in parts:
                yield from self._kill(captures)
            if "tensor-parallel" in parts:
                yield from self._tensor_parallel(captures)
        if "train" in parts:
            yield from self._train()

    def _load(self, model: Path, size: int) -> Iterator[Case]:
        def devices(count: int) -> list[str]:
            return ["cpu"] * count if self._arguments.device == "cpu" else [f"cuda:{rank}" for rank in range(count)]

        for count in self._counts:
            yield f"load-{count}", load_metrics(model, devices(count), size)
        most = max(self._counts)
        if (most + 1) * size > _MOST_OF_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
            print(f"load-{most}-through-host: left out, since {most} models don't fit into host memory", flush=True)
            return
        yield f"load-{most}-through-host", load_metrics(model, devices(most), size, WAYS[1])

    def _capture(self, captures: Captures, count: int) -> Iterator[Case]:
        outcome = self._outcomes[count] = captures.run(count)
        metrics = outcome.metrics()
        if count == 1:
            self._single = {name: metrics[name] for name in ("tok_s", "job_tok_s")}
        yield f"capture-{count}", metrics | self._efficiencies(metrics, count)

    def _efficiencies(self, metrics: Metrics, count: int) -> Metrics:
        """Return the efficiencies of `count` GPUs; none where one GPU was not measured."""
        names = {"tok_s": "efficiency", "job_tok_s": "job_efficiency"}
        return {
            named: metrics[name] / (count * self._single[name]) for name, named in names.items() if name in self._single
        }

    def _kill(self, captures: Captures) -> Iterator[Case]:
        most = max(self._counts)
        if most < 2:
            print("kill: left out, since a job of one worker ends with it", flush=True)
            return
        if most not in self._outcomes:
            yield from self._capture(captures, most)
        whole = self._outcomes[most]
        found = captures.run(most, kill_after=_KILL_AFTER, verify=True)
        per_worker = [item.tokens / item.worker_seconds for item in (found, whole)]
        yield (
            f"kill-{most}",
            {
                "tok_s": found.tokens / found.seconds,
                "efficiency": per_worker[0] / per_worker[1],
                "of_undisturbed": whole.seconds / found.seconds,
                "equal_shards": equal_share(found.hashes, whole.hashes),
                "verified_share": found.verified,
                "damages": float(found.damages),
            },
        )

    def _tensor_parallel(self, captures: Captures) -> Iterator[Case]:
        if not getattr(self._shape.verifier(), "base_model_tp_plan", None):
            print("tensor-parallel: left out, as this transformers has no plan for NemotronH; 5.23 has", flush=True)
            return
        for count in self._counts:
            if count not in _SPLITS or (count == 1 and 1 in self._outcomes):
                continue
            metrics = captures.run(1, tensor_parallel=count).metrics()
            if count == 1:  # of the same versions as the others
                self._single = {name: metrics[name] for name in ("tok_s", "job_tok_s")}
            yield f"capture-tp{count}", metrics | self._efficiencies(metrics, count)

    def _train(self) -> Iterator[Case]:
        trainings = Trainings(self._root, self._arguments.shape, self._arguments.device, max(self._counts))
        single: dict[str, float] = {}
        losses: list[float] = []
        for count in self._counts:
            outcome = trainings.run(count)
            for order in ORDERS:
                metrics = outcome.metrics[order]
                if count == 1:
                    single[order] = metrics["tok_s"]
                if order in single:
                    metrics["efficiency"] = metrics["tok_s"] / (count * single[order])
                if order == ORDERS[0]:
                    losses = losses or outcome.losses
                    metrics["loss_difference"] = loss_difference(outcome.losses, losses)
                    if count > 1:
                        metrics["wait_removed"] = 1 - outcome.waits[ORDERS[0]] / outcome.waits[ORDERS[1]]
                yield f"train-{count}{'' if order == ORDERS[0] else '-shuffled'}", metrics


def _wrong(rows: list[dict[str, Any]]) -> list[str]:
    """Return what is wrong about stores and losses, one text each."""
    found = []
    for row in rows:
        low, high = _ALLOWED.get(row["metric"], (float("-inf"), float("inf")))
        if not low <= row["value"] <= high:  # NaN too
            found.append(f"{row['case']}: expected {row['metric']} from {low} to {high}, found {row['value']:.4g}")
    return found


def _counts(text: str) -> list[int]:
    """Parse numbers of GPUs. Raises argparse.ArgumentTypeError."""
    if not all(word.isdecimal() and int(word) for word in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected numbers of GPUs such as 1,2,4, found {text!r}")
    return sorted({int(word) for word in text.split(",")})


def _powers(device: str) -> list[int]:
    """Return the powers of two up to the number of GPUs; 1 and 2 on a CPU."""
    most = 2 if device == "cpu" else torch.cuda.device_count()
    return [count for count in (2**power for power in range(8)) if count <= most]


def _require_means(arguments: argparse.Namespace) -> None:
    """Raise InputError where the machine can't run the chosen parts."""
    shape, most, captures = SHAPES[arguments.shape], max(arguments.gpus, default=1), arguments.parts != ["train"]
    if arguments.device == "cuda":
        if (found := torch.cuda.device_count()) < most or not found:
            raise InputError(f"--gpus: expected as many GPUs as the largest of {arguments.gpus}, found {found}")
        if captures and find_spec("mamba_ssm") is None:
            raise InputError(
                "expected mamba-ssm, whose scan the verifier's blocks need on a GPU, found none; the README says how "
                "to install it, and --parts train needs none"
            )
    tokens = max(
        most * (arguments.tokens or shape.capture_tokens) if captures else 0,
        sum(training_lengths(shape, most)) if "train" in arguments.parts else 0,
    )
    needed = tokens * _BYTES_PER_TOKEN
    if captures and arguments.checkpoint is None:
        needed += sum(entry_bytes(entry) for entry in published_tensors(shape.verifier()))
    arguments.work.mkdir(parents=True, exist_ok=True)
    if (free := disk_usage(arguments.work).free) < needed:
        raise InputError(
            f"--work {arguments.work}: expected {needed / 1e9:.0f} GB of room, found {free / 1e9:.0f} GB; give another "
            "directory or fewer --tokens, or make the memory's share larger (mount -o remount,size=400G /dev/shm)"
        )


def _kind_of_place(path: Path) -> str:
    """Say where a directory is, as far as its speed depends on that."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    above = [(where, kind) for where, kind in mounts if path.resolve().is_relative_to(where)]
    where, kind = max(above, key=lambda item: len(item[0]))
    return f"in memory ({where})" if kind in ("tmpfs", "ramfs") else f"on a disk ({where}, {kind})"


if __name__ == "__main__":
    try:
        main()
    except DraftcacheError as exc:
        sys.exit(f"draftcache.tools.bench.scale: error: {exc}")
