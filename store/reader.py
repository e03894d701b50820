"""Reading a store: committed shards only, by conversation, any subset of arrays."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from store.commits import check_record, committed_shards, read_record, require_file
from store.errors import InputError, ShardDamagedError, StoreError
from store.manifest import StoreManifest
from store.schema import INDEX_DTYPE, ROWS_AXIS, TEACHER_AXIS, TOKENS_AXIS, Conversation
from store.vocab_map import VocabMap
from store.zarr_shards import ShardArrays

INDEX_NAME = "index.npy"
FROZEN_NAME = "frozen.safetensors"
VOCAB_MAP_NAME = "vocab_map.safetensors"

_OPEN_SHARDS = 8


def shard_name(shard: int) -> str:
    """Five digits, as in the commit record's and the shard directory's names."""
    return f"{shard:05d}"


def shard_path(root: Path, shard: int) -> Path:
    """Directory of one shard: a zarr v3 group with its index.npy beside the arrays."""
    return root / "shards" / shard_name(shard)


def read_shard_index(root: Path, shard: int) -> NDArray[Any]:
    """Index rows of one committed shard. Raises ShardDamagedError."""
    path = shard_path(root, shard) / INDEX_NAME
    try:
        index = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as exc:
        raise ShardDamagedError(f"{path}: expected an index, could not read it ({exc})") from exc
    if index.dtype != INDEX_DTYPE:
        raise ShardDamagedError(f"{path}: expected index fields {INDEX_DTYPE.names}, found {index.dtype.names}")
    return np.asarray(index)


@dataclass(frozen=True)
class StoreFiles:
    """Top-level files that a trainer needs besides the shards."""

    frozen: Path
    """safetensors: embed_tokens [V, H], norm [H], lm_head [D, H] (the draft vocabulary's rows of the head)."""
    vocab_map: Path


class StoreReader:
    """Random access to the conversations of a store.

    A shard's file sizes are checked against its commit record when it is first touched, and every chunk's crc32c
    when it is read, so a missing or damaged shard is an error and never reads as zeros.
    """

    def __init__(self, root: Path | str, *, allow_partial: bool = False) -> None:
        """Open the store. `allow_partial` reads what is committed of a store whose capture has not finished."""
        self.root = Path(root)
        self.manifest = StoreManifest.load(self.root)
        self._specs = self.manifest.array_specs()
        self._shards: OrderedDict[int, ShardArrays] = OrderedDict()
        self.index = self._load_index(allow_partial)

    def _load_index(self, allow_partial: bool) -> NDArray[Any]:
        if read_record(self.root, "index") is not None:
            index = np.load(require_file(self.root, INDEX_NAME), allow_pickle=False)
            if index.dtype != INDEX_DTYPE:
                raise StoreError(f"{self.root / INDEX_NAME}: expected {INDEX_DTYPE.names}, found {index.dtype.names}")
            return np.asarray(index)
        shards = committed_shards(self.root)
        if not allow_partial:
            raise StoreError(
                f"{self.root}: expected a finished store of {self.manifest.shards} shards, found {len(shards)} "
                "committed; rerun the capture command to finish it"
            )
        parts = [read_shard_index(self.root, shard) for shard in shards]
        return np.concatenate(parts) if parts else np.empty(0, INDEX_DTYPE)

    def __len__(self) -> int:
        return int(self.index.shape[0])

    @property
    def files(self) -> StoreFiles:
        """Frozen weights and vocabulary map, their sizes checked."""
        return StoreFiles(
            frozen=require_file(self.root, FROZEN_NAME), vocab_map=require_file(self.root, VOCAB_MAP_NAME)
        )

    def vocab_map(self) -> VocabMap:
        """The draft-vocabulary map that the store was captured with, its hash checked against the manifest."""
        loaded = VocabMap.load(self.files.vocab_map)
        if loaded.hash != self.manifest.draft_vocab_hash:
            raise StoreError(
                f"{self.files.vocab_map}: expected vocabulary {self.manifest.draft_vocab_hash}, found {loaded.hash}"
            )
        return loaded

    def members(self, split: str) -> NDArray[np.int64]:
        """Numbers of the split's conversations, in the prepared dataset's order. Raises InputError."""
        if split not in self.manifest.splits:
            raise InputError(f"{self.root}: expected one of the splits {list(self.manifest.splits)}, found {split!r}")
        found = np.flatnonzero(self.index["split"] == self.manifest.splits.index(split))
        return found[np.argsort(self.index["dataset_index"][found], kind="stable")]

    def _shard(self, shard: int) -> ShardArrays:
        if shard in self._shards:
            self._shards.move_to_end(shard)
            return self._shards[shard]
        record = read_record(self.root, shard_name(shard))
        if record is None:
            raise ShardDamagedError(
                f"{self.root}: the index names shard {shard}, but it has no commit record; rerun capture"
            )
        if record["manifest_hash"] != self.manifest.hash:
            raise ShardDamagedError(
                f"{shard_path(self.root, shard)}: expected a shard of manifest {self.manifest.hash}, "
                f"found one of {record['manifest_hash']}; it was copied from another store"
            )
        check_record(self.root, record, hashes=False)
        self._shards[shard] = ShardArrays(shard_path(self.root, shard), self._specs)
        if len(self._shards) > _OPEN_SHARDS:
            self._shards.popitem(last=False)
        return self._shards[shard]

    def read(self, number: int, names: Iterable[str] | None = None) -> Conversation:
        """Read conversation `number` of `index`: all its arrays, or only those named."""
        row = self.index[number]
        arrays = self._shard(int(row["shard"]))
        spans = {
            TOKENS_AXIS: (int(row["first_token"]), int(row["tokens"])),
            ROWS_AXIS: (int(row["first_row"]), int(row["rows"])),
            TEACHER_AXIS: (int(row["first_teacher"]), int(row["teacher_rows"])),
        }
        wanted = self._specs if names is None else list(names)
        return Conversation(
            content_hash=row["content_hash"].tobytes().hex(),
            split=int(row["split"]),
            dataset_index=int(row["dataset_index"]),
            arrays={name: arrays.read(name, *spans[self._specs[name].axis]) for name in wanted},
        )

    def bytes_on_disk(self) -> int:
        """Bytes of all committed shard files, from the commit records."""
        total = 0
        for shard in committed_shards(self.root):
            record = read_record(self.root, shard_name(shard))
            assert record is not None
            total += sum(item["bytes"] for item in record["files"].values())
        return total
