"""Sums over the commit records of a store: shards, bytes, tail mass, tap norms, quarantined conversations."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from draftcache.store.common.errors import StoreNotFoundError
from draftcache.store.common.files import hash_json
from draftcache.store.common.sealed_json import SEAL
from draftcache.store.format.commits import (
    COMMIT_DIRECTORY,
    Record,
    committed_shards,
    record_name,
    require_record,
    shard_name,
)
from draftcache.store.format.index import INDEX_RECORD
from draftcache.store.format.manifest import StoreManifest, top_level_names
from draftcache.store.format.norm_band import NormBand
from draftcache.store.storage.asking import ask_side_by_side
from draftcache.store.storage.base import Storage


def commit_records(
    storage: Storage, manifest: StoreManifest, *, finished: bool = False
) -> Iterator[tuple[str, Record]]:
    """Yield the stem and the content of every commit record, shards first; other files beside them are passed by.

    The records of a `finished` store are asked for by name, so that a list that came back short leaves none out; those
    of another store are the listed ones. Raises StoreError for a damaged record, ShardDamagedError for a missing one.
    """
    stems = list(map(shard_name, range(manifest.shards)))
    others = sorted({INDEX_RECORD, *(Path(name).stem for name in top_level_names(manifest))})
    if not finished:
        listed = set(storage.list(COMMIT_DIRECTORY))
        stems = list(map(shard_name, committed_shards(storage)))
        others = [stem for stem in others if record_name(stem) in listed]
    stems += others
    yield from zip(stems, ask_side_by_side(storage, partial(_record, storage), stems), strict=True)


def _record(storage: Storage, stem: str) -> Record:
    """Return a commit record, the hash of its values checked. Comparing its text too would take 4 times as long."""
    try:
        value = json.loads(storage.read(record_name(stem)))
        if value.pop(SEAL) == hash_json(value) and isinstance(value["files"], dict):
            return dict(value)
    except (StoreNotFoundError, ValueError, TypeError, KeyError, AttributeError):
        pass
    return require_record(storage, stem)  # raises StoreError, which says what is wrong with the record


@dataclass
class RecordTotals:
    """Sums over the commit records that were added."""

    shards: int = 0
    file_bytes: dict[str, int] = field(default_factory=dict)
    """Bytes over all shards, by a file's name within its shard."""
    other_bytes: dict[str, int] = field(default_factory=dict)
    """Bytes of each file outside the shards, by its name in the store."""
    tails: list[dict[str, Any]] = field(default_factory=list)
    norms: dict[str, NormBand] = field(default_factory=dict)
    quarantined: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, record: Record) -> None:
        """Count one record; `name` is its stem, which is a number for a shard."""
        if not name.isdigit():
            self.other_bytes |= {file: int(entry["bytes"]) for file, entry in record["files"].items()}
            return
        self.shards += 1
        prefix, sums = len(record["directory"]) + 1, self.file_bytes
        for file, entry in record["files"].items():
            inside = file[prefix:]
            sums[inside] = sums.get(inside, 0) + entry["bytes"]
        if record.get("tail_mass", {}).get("count"):
            self.tails.append(record["tail_mass"])
        for layer, values in record.get("gates", {}).items():
            self.norms.setdefault(layer, NormBand()).join(NormBand(int(values[0]), *values[1:]))
        self.quarantined += record.get("quarantined", [])

    def figures(self, tokens: int) -> dict[str, Any]:
        """Return the sums as JSON values, with bytes per token of `tokens`.

        Keys: `shards_committed`; `bytes` (`total`, `shards`, `per_token`, `arrays` by name with the largest first, and
        `files` outside the shards; a shard's file that belongs to no single array counts under its own name);
        `tail_mass` (`count`, `mean` and `max_p99`, or None); `tap_norms` by layer; `quarantined`.
        """
        arrays: dict[str, int] = {}
        for file, size in self.file_bytes.items():
            # An array of a zarr shard is a directory, with the files c.0.0 and zarr.json. A tar shard has files only.
            key = file.partition("/")[0] if "/" in file else file
            arrays[key] = arrays.get(key, 0) + size
        shard_bytes = sum(arrays.values())
        return {
            "shards_committed": self.shards,
            "bytes": {
                "total": shard_bytes + sum(self.other_bytes.values()),
                "shards": shard_bytes,
                "per_token": ratio(shard_bytes, tokens),
                "arrays": {
                    name: {"bytes": size, "per_token": ratio(size, tokens)}
                    for name, size in sorted(arrays.items(), key=lambda item: -item[1])
                },
                "files": self.other_bytes,
            },
            "tail_mass": self._tail_mass(),
            "tap_norms": self._tap_norms(),
            "quarantined": self.quarantined,
        }

    def _tail_mass(self) -> dict[str, Any] | None:
        count = sum(item["count"] for item in self.tails)
        if not count:
            return None
        return {
            "count": count,
            "mean": sum(item["count"] * item["mean"] for item in self.tails) / count,
            "max_p99": max(item["p99"] for item in self.tails),
        }

    def _tap_norms(self) -> dict[str, dict[str, Any]]:
        """Return per layer the geometric mean of the conversations' rms and the spread of its logarithm.

        The gates sum the logarithm and its square shard by shard.
        """
        norms = {}
        for layer, band in self.norms.items():
            if band.count:
                mean = band.total / band.count
                sigma = math.sqrt(max(band.squares / band.count - mean * mean, 0.0))
                norms[layer] = {"conversations": band.count, "rms": math.exp(mean), "log_sigma": sigma}
        return norms


def ratio(value: int, total: int) -> float:
    """Return `value` / `total`, or 0.0 for a total of 0."""
    return value / total if total else 0.0
