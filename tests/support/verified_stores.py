"""Stores of several shards, their damage, and which shards a verification reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from draftcache.store import verify
from draftcache.store.shard_checks import ShardReport
from draftcache.store.verify import verify_store
from draftcache.store.writer import StoreWriter
from support.synthetic import items_of, manifest, write_files

SHARDS = 10


def write(root: Path, shards: int = SHARDS) -> Path:
    """Write a finished store of shards of two conversations, and give its path back."""
    with StoreWriter(root, manifest(shards=shards), write_files) as writer:
        for shard in range(shards):
            writer.write_shard(shard, items_of(shard, 2), {"quarantined": [], "gates": {}})
        writer.finish()
    return root


def flip(path: Path, place: int = -1) -> None:
    """Change one bit of a file's byte."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def damage(store: Path, shard: int) -> None:
    """Change one bit of a shard's array."""
    flip(store / "shards" / f"{shard:05d}" / "token_ids" / "c.0")


def read_from_disk(store: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[list[int], Any]:
    """Return the shards that a verification in this process reads in full, and its report."""
    read: list[int] = []

    def check(location: Any, number: int, known: Any, *, quick: bool) -> ShardReport:
        if not quick:
            read.append(number)
        return checked(location, number, known, quick=quick)

    checked = verify.check_shards.__globals__["check_shard"]
    with monkeypatch.context() as patch:
        patch.setitem(verify.check_shards.__globals__, "check_shard", check)
        report = verify_store(store, workers=1, **settings)
    return sorted(read), report
