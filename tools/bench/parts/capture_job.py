"""One capture of random conversations through the capture job's worker, with a verifier that is already in memory."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.profiler import ProfilerActivity, profile

from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.progress import Event
from draftcache.capture.job.shard_capture import ShardCapture
from draftcache.capture.job.shard_worker import ShardWorker, WorkerRole
from draftcache.capture.job.work_plan import WorkPlan, plan_shards
from draftcache.capture.prepare.token_dataset import TokenDataset
from draftcache.capture.verifier.load import Verifier
from draftcache.store.common.files import hash_bytes
from draftcache.store.common.stopping import StopRequest
from draftcache.store.common.tensor_files import save_tensors
from draftcache.store.format import torch_codecs
from draftcache.store.format.channel_scales import Calibration
from draftcache.store.format.frozen import FROZEN_NAME, NORM
from draftcache.store.format.manifest import StoreManifest, Tap
from draftcache.store.format.rows import teacher_positions
from draftcache.store.format.vocab_map import VOCAB_MAP_NAME, VocabMap
from draftcache.store.reader import StoreReader
from draftcache.store.writer import StoreWriter
from draftcache.tools.bench.parts.scale_shapes import turns_mask
from draftcache.tools.bench.parts.verifier_shape import DRAFT_VOCAB, LAYERS


@dataclass(frozen=True)
class CaptureRun:
    """The size of one capture, and the time and memory that it took."""

    lengths: list[int]
    teacher_rows: int
    seconds: float
    kernel_seconds: float
    """Sum of the kernels' seconds, without copies; 0 if they were not traced."""
    bytes_written: int
    peak_bytes: int


class Conversations:
    """A prepared dataset of random tokens, in turns of equal length; the assistant wrote the last 48 % of each turn."""

    def __init__(self, lengths: Sequence[int], vocab_size: int) -> None:
        rng = np.random.default_rng(0)
        self.conversations = {"tokens": np.array(lengths)}
        self._tokens = [rng.integers(0, vocab_size, length).astype(np.uint32) for length in lengths]

    def split(self, _name: str) -> Conversations:
        """Return this dataset itself, as it has a single split."""
        return self

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, number: int) -> tuple[NDArray[Any], NDArray[np.bool_], str]:
        tokens = self._tokens[number]
        return tokens, turns_mask(tokens.size), hash_bytes(tokens.tobytes())


def run_capture(verifier: Verifier, lengths: list[int], root: Path, mode: str, *, trace: bool = False) -> CaptureRun:
    """Capture conversations of these lengths into a store at `root`, read its index back, and return the measurements.

    `trace` records `kernel_seconds`, which slows the capture a little.
    """
    dataset = Conversations(lengths, verifier.vocab_size)
    config = CaptureConfig(
        verifier=Path("random"), dataset=Path("random"), output=root, layers=LAYERS, mode=mode, shard_tokens=262_144
    )
    work = WorkPlan(
        dataset=cast("TokenDataset", dataset),
        splits=("train",),
        shards=plan_shards(cast("TokenDataset", dataset), ("train",), config.shard_tokens),
    )
    every = np.linspace(0, verifier.vocab_size - 1, DRAFT_VOCAB).astype(np.int64)
    vocab_map = VocabMap(target_ids=every, vocab_size=verifier.vocab_size)
    manifest = _manifest(config, verifier, vocab_map, work)
    if mode == "int8":
        manifest = _calibrated(manifest, verifier)

    def write_files(directory: Path) -> list[Path]:
        save_tensors(directory / FROZEN_NAME, {NORM: np.ones(1, np.float32)})
        vocab_map.save(directory / VOCAB_MAP_NAME)
        return [directory / FROZEN_NAME, directory / VOCAB_MAP_NAME]

    def report(_event: Event) -> None:
        pass

    torch.cuda.reset_peak_memory_stats()
    tracing = profile(activities=[ProfilerActivity.CUDA]) if trace else nullcontext()
    with StoreWriter(root, manifest, write_files) as writer, tracing as profiler:
        shards = ShardCapture(config, work, verifier, [vocab_map], manifest)
        worker = ShardWorker(work, shards, writer, WorkerRole(report, StopRequest(25.0)), dict)
        started = time.perf_counter()
        worker.run()
        seconds = time.perf_counter() - started
    reader = StoreReader(root)
    assert len(reader) == len(lengths), "every conversation was stored"
    events = profiler.key_averages() if profiler is not None else []
    kernels = [event for event in events if not event.key.startswith(("Memcpy", "Memset"))]
    return CaptureRun(
        lengths=lengths,
        teacher_rows=sum(teacher_positions(dataset[number][1]).size for number in range(len(dataset))),
        seconds=seconds,
        kernel_seconds=sum(event.self_device_time_total for event in kernels) / 1e6,
        bytes_written=reader.bytes_on_disk(),
        peak_bytes=torch.cuda.max_memory_allocated(),
    )


def _manifest(config: CaptureConfig, verifier: Verifier, vocab_map: VocabMap, work: WorkPlan) -> StoreManifest:
    return StoreManifest(
        verifier={"name": "random", "hidden_size": verifier.hidden_size, "vocab_size": verifier.vocab_size},
        tokenizer_hash="",
        chat_template_hash="",
        dataset_hash="",
        splits=work.splits,
        taps=tuple(Tap(layer=layer) for layer in LAYERS),
        mode=config.mode,
        layout=config.layout,
        compute_dtype="bfloat16",
        window=config.window,
        top_k=config.top_k,
        draft_vocab_size=len(vocab_map),
        draft_vocab_hash=vocab_map.hash,
        shard_tokens=config.shard_tokens,
        shards=len(work.shards),
        ssm=None,
    )


def _calibrated(manifest: StoreManifest, verifier: Verifier) -> StoreManifest:
    """Return the manifest with int8's channel scales, calibrated on one conversation of 4,096 random tokens."""
    calibration = Calibration(LAYERS, verifier.hidden_size)
    states = verifier.forward(torch.randint(0, verifier.vocab_size, (4096,)), LAYERS)
    for layer, tap in states.taps.items():
        torch_codecs.add_squares(calibration, layer, tap)
    return replace(manifest, channel_scales=calibration.finish().to_json())
