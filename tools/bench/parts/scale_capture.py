"""Captures of `draftcache.tools.bench.scale`: workers over one store, one of them killed, a split verifier."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np

from draftcache.store.common.errors import WorkerError
from draftcache.store.common.files import write_json
from draftcache.store.format.commits import committed_shards, require_record, shard_name
from draftcache.store.reader import StoreReader
from draftcache.store.storage.base import open_storage
from draftcache.store.verify import verify_store
from draftcache.tools.bench.parts.gpu_clocks import GpuClocks
from draftcache.tools.bench.parts.random_dataset import write_random_dataset
from draftcache.tools.bench.parts.scale_job import Job
from draftcache.tools.bench.parts.scale_shapes import ScaleShape, mixed_lengths, turns_mask

_RAMP = 0.25
"""Share of a worker's shards that are left out of its rate, at least one: kernels are compiled and tuned in them."""
_FEW = 12
"""A worker that commits fewer shards has a rate over all of its time: between a few commits it means nothing."""
_VERIFIED_BYTES = 8e9
"""About how much of a store is read in full after a kill; the other shards are checked by record and size."""

Metrics = dict[str, float]
Hashes = dict[int, dict[str, str]]
"""For each shard, the xxh3-128 of every file."""


@dataclass(frozen=True, kw_only=True)
class CaptureOutcome:
    """What one capture took, and what it wrote."""

    tokens: int
    worker_rates: list[float]
    """Tokens per second of each worker between its commits, those of the first quarter left out."""
    seconds: float
    """From the moment when the first worker gave the first conversations to its device to the last commit."""
    worker_seconds: float
    """The same, summed over workers: each from its own first conversations on; a killed one until it was killed."""
    imbalance: float
    waiting_share: float
    """Share of the workers' time for which their devices waited until what they had computed was written."""
    start: float
    """Seconds from the job's start until its last worker gave the first conversations to its device."""
    stored_bytes: int
    hashes: Hashes
    clocks: dict[str, float] = field(default_factory=dict)
    """Mean clock and power of the workers' GPUs in that time, as `GpuClocks.means` has them."""
    damages: int = 0
    verified: float = 0.0
    """Share of the shards that were read in full and found good."""

    @property
    def rate(self) -> float:
        """Sum of the workers' rates."""
        return sum(self.worker_rates)

    def metrics(self) -> Metrics:
        """Return the metrics of the case, without efficiencies."""
        return {
            "tok_s": self.rate,
            "job_tok_s": self.tokens / self.seconds,
            "gb_s": self.stored_bytes / self.seconds / 1e9,
            "imbalance": self.imbalance,
            "write_wait_share": self.waiting_share,
            "start_s": self.start,
            **self.clocks,
        }


class Captures:
    """Runs captures of one verifier below one directory; a store is removed as soon as its figures are taken."""

    def __init__(self, root: Path, model: Path, shape: ScaleShape, device: str, tokens: int) -> None:
        """`tokens` are those per worker."""
        self._root, self._model, self._shape, self._device, self._tokens = root, model, shape, device, tokens

    def run(
        self, workers: int, *, tensor_parallel: int = 1, kill_after: float = 0.0, verify: bool = False
    ) -> CaptureOutcome:
        """Capture `workers` times the same lengths, of other random ids, into a new store.

        Raises WorkerError where the job fails, or stores another number of conversations.
        """
        shape = self._shape
        lengths = np.random.default_rng(1).permutation(mixed_lengths(shape.longest, tokens=self._tokens) * workers)
        vocab_size = int(shape.verifier().vocab_size)
        dataset = write_random_dataset(
            self._root / "dataset", lengths.tolist(), ids=(2, vocab_size), vocab_size=vocab_size,
            draft_vocab_size=shape.draft_vocab, mask=turns_mask,
        )  # fmt: skip
        store = self._root / "store"
        settings = {
            "verifier": str(self._model), "dataset": str(dataset), "output": str(store), "layers": list(shape.layers),
            "shard_tokens": shape.shard_tokens, "device": self._device, "tensor_parallel": tensor_parallel,
        }  # fmt: skip
        try:
            job = Job(settings=settings, workers=workers, kill_after=kill_after)
            with nullcontext() if self._device == "cpu" else GpuClocks() as clocks:
                report = self._watched(job)
            return _outcome(report, store, len(lengths), clocks, range(workers * tensor_parallel), verify=verify)
        finally:
            rmtree(store, ignore_errors=True)
            rmtree(dataset)

    def _watched(self, job: Job) -> dict[str, Any]:
        """Run the job in a process of its own and return its report."""
        asked, answer = self._root / "job.json", self._root / "report.json"
        write_json(asked, asdict(job))
        command = [sys.executable, "-m", "draftcache.tools.bench.parts.scale_job", str(asked), str(answer)]
        more = {"OMP_NUM_THREADS": "1"} if self._device == "cpu" else {}
        code = subprocess.run(command, check=False, env=os.environ | more).returncode
        if code:
            raise WorkerError(f"expected a capture by {job.workers} workers to finish, found exit code {code}")
        report: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
        return report


def _outcome(
    report: dict[str, Any], root: Path, conversations: int, clocks: GpuClocks | None, gpus: range, *, verify: bool
) -> CaptureOutcome:
    store, workers, killed = StoreReader(root), list(report["workers"].items()), report["killed"]
    if len(store) != conversations:
        raise WorkerError(f"expected a store of {conversations} conversations, found {len(store)}; see above")
    began = [item["began"] for _, item in workers]
    last = [item["commits"][-1][0] if item["commits"] else item["began"] for _, item in workers]
    ends = [killed["time"] if killed and int(number) == killed["worker"] else max(last) for number, _ in workers]
    stored = store.bytes_on_disk()
    sample = min(1.0, _VERIFIED_BYTES / stored)
    checked = verify_store(root, sample=None if sample == 1.0 else sample) if verify else None
    return CaptureOutcome(
        tokens=int(store.index["tokens"].sum()),
        worker_rates=[worker_rate(item["began"], item["commits"]) for _, item in workers],
        seconds=max(last) - min(began),
        worker_seconds=sum(ends) - sum(began),
        imbalance=(max(last) - float(np.mean(last))) / (max(last) - min(began)),
        waiting_share=sum(item["waited_seconds"] for _, item in workers)
        / max(sum(item["seconds"] for _, item in workers), 1e-9),
        start=max(began) - report["started"],
        stored_bytes=stored,
        hashes=shard_hashes(root),
        clocks=clocks.means(min(began), max(last), gpus) if clocks else {},
        damages=len(checked.damages) if checked else 0,
        verified=sample if checked and not checked.damages else 0.0,
    )


def worker_rate(began: float, commits: list[list[float]]) -> float:
    """Return a worker's tokens per second by the time of its beginning, and by times and tokens of its commits.

    A shard is committed when the next one has been given to the device, and the last one is not: it comes too early.
    So the rate is that from the end of the ramp to the last commit but one, or, where there are few commits, that of
    all the worker's time.
    """
    ramp = max(1, int(_RAMP * len(commits)))
    if not commits:
        return 0.0
    if len(commits) < _FEW:
        return sum(tokens for _, tokens in commits) / (commits[-1][0] - began)
    return sum(tokens for _, tokens in commits[ramp:-1]) / (commits[-2][0] - commits[ramp - 1][0])


def shard_hashes(root: Path) -> Hashes:
    """Return the hashes of every committed shard's files, by their names below the shard's own directory."""
    storage = open_storage(root)
    records = {shard: require_record(storage, shard_name(shard)) for shard in committed_shards(storage)}
    return {
        shard: {name.removeprefix(record["directory"]): entry["xxh3_128"] for name, entry in record["files"].items()}
        for shard, record in records.items()
    }


def equal_share(found: Hashes, expected: Hashes) -> float:
    """Return the share of the expected shards that were found with the same files."""
    return sum(found.get(shard) == files for shard, files in expected.items()) / len(expected)
