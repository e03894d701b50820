"""Whether the disk has room for the rest of a store, before the verifier's weights are loaded."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from draftcache.capture.job.config import CaptureConfig
from draftcache.capture.job.store_size import count_dataset, frozen_bytes, shard_bytes, sized_teacher, specs_of
from draftcache.capture.job.work_plan import WorkPlan
from draftcache.store.common.errors import InputError
from draftcache.store.format.commits import committed_shards
from draftcache.store.storage.base import Storage


def bytes_left(
    config: CaptureConfig,
    work: WorkPlan,
    storage: Storage,
    *,
    hidden_size: int,
    vocab_size: int,
    draft_vocab_sizes: Sequence[int],
    dtype: torch.dtype,
) -> int:
    """Return an estimate of the bytes that a job has still to write, as `draftcache size` makes it.

    What is committed already counts by its share of the tokens.
    """
    compute_dtype = str(dtype).removeprefix("torch.")
    teacher = sized_teacher(
        config.teacher,
        top_k=config.top_k,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        compute_dtype=compute_dtype,
        draft_vocab_sizes=draft_vocab_sizes,
    )
    specs = specs_of(config.mode, layers=config.layers, hidden_size=hidden_size, teacher=teacher)
    counts = count_dataset(work.dataset, config.window or None, config.shard_tokens, work.splits)
    missing = set(range(len(work.shards))) - set(committed_shards(storage))
    share = work.tokens(missing) / max(1, work.tokens(range(len(work.shards))))
    shards = sum(shard_bytes(counts, specs, config.layout).values()) * share
    frozen = frozen_bytes(hidden_size, vocab_size, draft_vocab_sizes, compute_dtype)
    return round(shards + (frozen if len(missing) == len(work.shards) else 0))


def require_space(root: Path, needed: int) -> None:
    """Raise InputError where the filesystem of a directory, which need not exist yet, has fewer free bytes.

    Other jobs that write there at the same time are not known, so this finds disks that are too small, and not all that
    will be full.
    """
    existing = next(path for path in (root, *root.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InputError(
            f"--output {root}: expected about {needed / 1e9:,.1f} GB of free space, which the rest of the store takes, "
            f"found {free / 1e9:,.1f}; free some, choose another disk or --mode, or give --ignore-free-space "
            "where the files are moved away meanwhile"
        )
