"""Runs side by side on one GPU against one run alone: GPU throughput, and how often the store is read.

`python -m draftcache.tools.bench.sweep [--output FILE]` writes a lossless store of random states of the 30B verifier's
shape and trains on it as `draftcache sweep` does: one run alone, then four that differ in learning rate and weights.
Case `sweep-32k` has conversations of 32k tokens, one per optimizer step; `sweep-8k` has four of 8k in a pack. Every row
carries loss. The metrics are tokens per second of the second epoch, whose data the first one has left in the machine's
memory, summed over the runs; `of_alone`, the four runs' sum over the run alone; `store_reads`, the bytes that the
process read in both epochs over twice the store's; and the peak of GPU memory.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.data.frozen import TrainingSource
from draftcache.draft_train.ranks import Ranks
from draftcache.draft_train.side_by_side import Steps, train_side_by_side
from draftcache.draft_train.training_run import TrainingRun
from draftcache.store.common.errors import InputError
from draftcache.store.reader import StoreReader
from draftcache.tools.bench.parts.train_cases import SHAPE
from draftcache.tools.bench.parts.train_loader import write_store
from draftcache.tools.result_rows import report, result_row, some_of

EPOCHS = 2
RUNS = 4
CASES = {"sweep-32k": (32_768, 8, 1), "sweep-8k": (8192, 32, 4)}
"""Tokens of a conversation, conversations, and conversations per optimizer step."""
UNITS = {"tok_s": "tok/s", "of_alone": "of one run", "store_reads": "of the store's bytes", "peak_gib": "GiB"}


def main() -> None:
    """Measure the chosen cases, and report their rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--cases", type=some_of(CASES), default=",".join(CASES), help="(%(default)s)")
    parser.add_argument("--directory", type=Path, help="for the store, 4 GB (default: a temporary one)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise InputError("expected a CUDA device, found none; this benchmark measures one")
    name, rows = torch.cuda.get_device_name(), []
    for case in arguments.cases:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as root:
            for ending, metrics in measure(Path(root), *CASES[case]).items():
                rows += [result_row(case + ending, key, value, UNITS[key], name) for key, value in metrics.items()]
    report(rows, arguments.output)


def measure(root: Path, length: int, conversations: int, batch: int) -> dict[str, dict[str, float]]:
    """Return the metrics of a run alone (key "-alone") and of several side by side (key "")."""
    write_store(root / "store", SHAPE, length, conversations, torch.device("cuda"))
    found = {}
    for ending, count in (("-alone", 1), ("", RUNS)):
        configs = [
            TrainConfig(
                store=root / "store",
                output=root / f"run{ending}-{number}",
                splits=("train",),
                epochs=EPOCHS,
                batch_conversations=batch,
                pack_tokens=batch * length,
                learning_rate=1e-4 * (1 + number),
                seed=number,
                order_seed=0,
                device="cuda",
                checkpoint_every=10_000,
            )
            for number in range(count)
        ]
        found[ending] = train(root / "store", configs)
        gc.collect()
        torch.cuda.empty_cache()
    found[""]["of_alone"] = found[""]["tok_s"] / found["-alone"]["tok_s"]
    return found


def train(store: Path, configs: Sequence[TrainConfig]) -> dict[str, float]:
    """Train these runs side by side; return their metrics."""
    reader, source = StoreReader(store), TrainingSource(store)
    torch.cuda.reset_peak_memory_stats()
    ends, read = list[float](), list[int]()

    def note(steps: Steps) -> list[bool]:
        torch.cuda.synchronize()
        ends.append(time.perf_counter())
        read.append(bytes_read())  # before the last step's checkpoint, whose files are read to hash them
        return [True] * len(steps)

    with ExitStack() as stack:
        runs = [TrainingRun(config, Ranks(torch.device("cuda")), None, source) for config in configs]
        for run in runs:
            stack.enter_context(run.started())
        before = bytes_read()
        require_none(train_side_by_side(runs, note))
        per_epoch = runs[0].schedule.steps_per_epoch
    tokens = len(configs) * int(reader.index["tokens"].sum())
    seconds = ends[-2] - ends[per_epoch - 1]  # the last step saves a checkpoint of every run
    return {
        "tok_s": tokens * (per_epoch - 1) / per_epoch / seconds,
        "store_reads": (read[-1] - before) / (EPOCHS * reader.bytes_on_disk()),
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def require_none(errors: Sequence[Any]) -> None:
    """Raise the first error of a run."""
    for error in errors:
        if error is not None:
            raise error


def bytes_read() -> int:
    """Return the bytes that this process has read from files, cached ones included."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


if __name__ == "__main__":
    main()
