"""Training from a store on disk, for `draftcache.tools.bench.train`, to see whether the GPU waits for data.

A lossless store of conversations of 32k tokens, with loss on every row and random states and teacher, is written once.
`Trainer` trains on it as `draftcache train` does, with each attention: the first epoch begins with none of the store's
files in the machine's memory, the second with what the first has left in memory.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from draftcache.draft_train.checkpoint import load_draft, load_state, resolve_checkpoint
from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.data.frozen import FrozenWeights
from draftcache.draft_train.data.prefetch import local_readers
from draftcache.draft_train.drafts.eagle3.shape import Eagle3Shape
from draftcache.draft_train.measure import measure_draft
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.files import hash_bytes
from draftcache.store.common.tensor_files import save_tensors
from draftcache.store.format.array_spec import tap_name
from draftcache.store.format.frozen import EMBED_TOKENS, FROZEN_NAME, NORM
from draftcache.store.format.manifest import StoreManifest, Tap
from draftcache.store.format.rows import rows_in_reach, teacher_positions
from draftcache.store.format.schema import Conversation
from draftcache.store.format.vocab_map import VOCAB_MAP_NAME, VocabMap
from draftcache.store.reader import StoreReader
from draftcache.store.writer import StoreWriter

LAYERS = (2, 26, 48)
_WARM_UP = 3
_PER_SHARD = 2


def loader_metrics(store: Path, output: Path, shape: Eagle3Shape, attention: str) -> dict[str, dict[str, float]]:
    """Return the metrics of an epoch from disk (key "") and of one from memory (key "-in-memory").

    The first steps are left out. `disk_gb_s` is measured before training.
    """
    reader = StoreReader(store)
    conversations, tokens = len(reader), int(reader.index["tokens"].sum())
    drop_from_memory(store)
    disk = reading_rate(store)
    drop_from_memory(store)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    config = TrainConfig(
        store=store, output=output, splits=("train",), epochs=2, device="cuda",
        checkpoint_every=2 * conversations, num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads, head_dim=shape.head_dim,
        sliding_window=shape.sliding_window or 0, intermediate_size=shape.intermediate_size, attention=attention,
    )  # fmt: skip
    Trainer(config).run()
    peak = torch.cuda.max_memory_allocated() / 2**30
    steps = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    epochs = {"": steps[_WARM_UP:conversations], "-in-memory": steps[conversations:]}
    per_token = reader.bytes_on_disk() / tokens
    metrics = {name: _metrics(epoch, per_token) | {"peak_gib": peak} for name, epoch in epochs.items()}
    metrics[""]["disk_gb_s"] = disk
    return metrics


def evaluation_metrics(store: Path, run: Path, shape: Eagle3Shape) -> dict[str, float]:
    """Return the metrics of evaluating a run's draft on every row of the store, which is in memory, as training does.

    It proposes as many tokens per row as training unrolls, by the same rows. The first evaluation warms up.
    """
    reader, device = StoreReader(store), torch.device("cuda")
    path = resolve_checkpoint(run)
    frozen, draft = FrozenWeights.load(reader, device), load_draft(path, load_state(path), device)
    members = np.arange(len(reader))

    def evaluate(some: NDArray[np.int64]) -> None:
        measure_draft(draft, frozen, reader, some, draft_tokens=TrainConfig.ttt_steps)
        torch.cuda.synchronize()

    evaluate(members[:_WARM_UP])
    torch.cuda.reset_peak_memory_stats()
    started = time.monotonic()
    evaluate(members)
    rate = int(reader.index["tokens"].sum()) / (time.monotonic() - started)
    return {"tok_s": rate, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def _metrics(steps: list[dict[str, Any]], bytes_per_token: float) -> dict[str, float]:
    """Return the metrics of an epoch as a whole, because one step's wait can belong to the data of other steps."""
    seconds = sum(step["tokens"] / step["tokens_per_second"] for step in steps)
    rate = sum(step["tokens"] for step in steps) / seconds
    waits = sum(step["data_wait_share"] * step["tokens"] / step["tokens_per_second"] for step in steps)
    return {
        "tok_s": rate,
        "median_tok_s": statistics.median(step["tokens_per_second"] for step in steps),
        "data_wait_share": waits / seconds,
        "gb_s": rate * bytes_per_token / 1e9,
    }


def write_store(root: Path, shape: Eagle3Shape, length: int, conversations: int, device: torch.device) -> None:
    """Write a finished store of `conversations` random conversations of `length` tokens."""
    made, words = store_manifest(shape, _PER_SHARD * length, -(-conversations // _PER_SHARD))
    with StoreWriter(root, made, frozen_files(shape, words, device)) as writer:
        for shard in range(made.shards):
            numbers = range(shard * _PER_SHARD, min((shard + 1) * _PER_SHARD, conversations))
            mask = np.ones(length, np.bool_)
            items = [random_conversation(shape, length, number, device, mask=mask) for number in numbers]
            writer.write_shard(shard, items, {"quarantined": [], "gates": {}})
        writer.finish()


def frozen_files(shape: Eagle3Shape, words: VocabMap, device: torch.device) -> Callable[[Path], list[Path]]:
    """Return what writes a store's frozen weights, which are random, and its vocabulary map."""

    def write_files(directory: Path) -> list[Path]:
        rows = {EMBED_TOKENS: shape.vocab_size, NORM: 0, "lm_head": shape.draft_vocab_size}
        tensors = {
            name: torch.randn(*([count] if count else []), shape.hidden_size, device=device).bfloat16().cpu() * 0.02
            for name, count in rows.items()
        }
        save_tensors(directory / FROZEN_NAME, tensors)
        words.save(directory / VOCAB_MAP_NAME)
        return [directory / FROZEN_NAME, directory / VOCAB_MAP_NAME]

    return write_files


def store_manifest(
    shape: Eagle3Shape, shard_tokens: int, shards: int, splits: tuple[str, ...] = ("train",)
) -> tuple[StoreManifest, VocabMap]:
    """Return the manifest of a lossless store of random states, and its vocabulary map."""
    words = VocabMap(target_ids=np.arange(shape.draft_vocab_size, dtype=np.int64), vocab_size=shape.vocab_size)
    manifest = StoreManifest(
        verifier={
            "name": "random", "architecture": "none", "weights_hash": "", "hidden_size": shape.hidden_size,
            "vocab_size": shape.vocab_size, "rms_norm_eps": shape.rms_norm_eps,
        },
        tokenizer_hash="", chat_template_hash="", dataset_hash="", splits=splits,
        taps=tuple(Tap(layer=layer) for layer in LAYERS), mode="lossless", compute_dtype="bfloat16",
        window=shape.sliding_window, top_k=64, draft_vocab_size=shape.draft_vocab_size, draft_vocab_hash=words.hash,
        shard_tokens=shard_tokens, shards=shards, ssm=None,
    )  # fmt: skip
    return manifest, words


def random_conversation(
    shape: Eagle3Shape, length: int, number: int, device: torch.device, *, mask: NDArray[np.bool_], split: int = 0
) -> Conversation:
    """Return a conversation of random ids, states and teacher, with loss where `mask` [length] says so."""
    rows, taught = rows_in_reach(mask, shape.sliding_window), teacher_positions(mask)
    token_ids = torch.randint(0, shape.draft_vocab_size, (length,), device=device).cpu().numpy().astype(np.uint32)
    logits, ids = torch.randn(len(taught), shape.draft_vocab_size // 16, device=device).mul_(2.0).topk(64, dim=-1)
    best = logits[:, :1]
    log_z = torch.logsumexp(logits, -1).add_(0.1).cpu().numpy()
    arrays: dict[str, NDArray[Any]] = {
        "token_ids": token_ids,
        "loss_mask": mask.astype(np.uint8),
        "positions": rows.astype(np.int32),
        "teacher_positions": taught.astype(np.int32),
        "teacher_ids": ids.cpu().numpy().astype(np.uint16),
        "teacher_gaps": (best - logits).half().cpu().numpy(),
        "teacher_max": best[:, 0].cpu().numpy(),
        "log_z_full": log_z + np.float32(0.01),
        "log_z_draft": log_z,
        "argmax": ids[:, 0].cpu().numpy().astype(np.uint32),
        "next_token_logit": logits[:, 1].cpu().numpy(),
    }
    for layer in LAYERS:
        states = torch.randn(len(rows), shape.hidden_size, device=device, dtype=torch.bfloat16)
        arrays[tap_name(layer)] = states.view(torch.uint16).cpu().numpy()
    return Conversation(
        content_hash=hash_bytes(token_ids.tobytes(), arrays["loss_mask"].tobytes()),
        split=split,
        dataset_index=number,
        arrays=arrays,
    )


def reading_rate(root: Path) -> float:
    """Return the GB/s of reading the files without using their content, with as many threads as training reads with."""
    paths = [path for path in root.rglob("*") if path.is_file()]
    started = time.monotonic()
    with ThreadPoolExecutor(local_readers()) as pool:
        read = sum(pool.map(_read_through, paths))
    return read / (time.monotonic() - started) / 1e9


def _read_through(path: Path) -> int:
    """Read a whole file and return its bytes."""
    block, read = bytearray(1 << 20), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            read += count
    return read


def drop_from_memory(root: Path) -> None:
    """Drop these files from the page cache, so that the next reads come from the disk."""
    for path in root.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
