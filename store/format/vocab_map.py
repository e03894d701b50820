"""The draft-vocabulary map: which D of the verifier's V token ids the draft can propose.

A map's file is safetensors with `d2t` [D] int64 in offset form (target id = i + d2t[i]) and `t2d` [V] bool. Target ids
are sorted ascending. A map is known by its hash, which every shard, checkpoint and export carries: a draft head trained
on one map is wrong, silently and everywhere, under another.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from draftcache.store.common.errors import InputError
from draftcache.store.common.files import atomic_path, canonical_json, hash_bytes, require_file
from draftcache.store.common.strict_json import parse_json
from draftcache.store.common.tensor_files import save_tensors

VOCAB_MAP_NAME = "vocab_map.safetensors"
"""Name of the main map's file, in a store and in a prepared dataset."""
_METADATA_KEY = "draftcache_vocab_map"


@dataclass(frozen=True, kw_only=True)
class VocabMap:
    """D target ids out of `vocab_size`. Raises InputError where they are not sorted, unique and in range."""

    target_ids: np.ndarray
    """[D] int64, strictly ascending: the verifier's id of each draft id."""
    vocab_size: int
    """V, the verifier's rows of logits."""
    sources: tuple[str, ...] = field(default=(), compare=False)
    """What the map was made from, for people to read. It is no part of the hash."""

    def __post_init__(self) -> None:
        ids = self.target_ids
        if ids.ndim != 1 or ids.dtype != np.int64 or len(ids) == 0:
            raise InputError(f"vocabulary map: expected int64 [D], D > 0, found {ids.dtype} {list(ids.shape)}")
        if (np.diff(ids) <= 0).any() or ids[0] < 0 or ids[-1] >= self.vocab_size:
            raise InputError(
                f"vocabulary map: expected strictly ascending target ids in [0, {self.vocab_size}), "
                f"found {ids[0]} .. {ids[-1]}, {int((np.diff(ids) <= 0).sum())} steps out of order"
            )

    def __len__(self) -> int:
        return len(self.target_ids)

    @cached_property
    def d2t(self) -> np.ndarray:
        """[D] int64 in offset form: target id = i + d2t[i]."""
        return self.target_ids - np.arange(len(self.target_ids), dtype=np.int64)

    @cached_property
    def t2d(self) -> np.ndarray:
        """[V] bool: whether a target id is in the draft vocabulary."""
        inside = np.zeros(self.vocab_size, np.bool_)
        inside[self.target_ids] = True
        return inside

    @cached_property
    def hash(self) -> str:
        """xxh3-128 of the target ids as little-endian int64, followed by V as one more."""
        return hash_bytes(self.target_ids.astype("<i8").tobytes(), np.array([self.vocab_size], "<i8").tobytes())

    def padded(self, vocab_size: int) -> VocabMap:
        """Return the same ids over a head of `vocab_size` rows.

        A verifier's head may have more rows than its tokenizer has ids.
        """
        return replace(self, vocab_size=vocab_size)

    def target_to_draft(self) -> np.ndarray:
        """Return the draft id of each target id, [V] int32, with -1 outside the draft vocabulary."""
        lookup = np.full(self.vocab_size, -1, np.int32)
        lookup[self.target_ids] = np.arange(len(self.target_ids), dtype=np.int32)
        return lookup

    def save(self, path: Path) -> None:
        """Write the map to a file, atomically. Equal maps with equal sources give equal bytes."""
        details = {
            "hash": self.hash,
            "draft_vocab_size": len(self),
            "vocab_size": self.vocab_size,
            "sources": list(self.sources),
        }
        # There is one metadata key only: safetensors writes several keys in an order that differs from run to run.
        metadata = {_METADATA_KEY: canonical_json(details)}
        with atomic_path(path) as partial:
            save_tensors(partial, {"d2t": self.d2t, "t2d": self.t2d}, metadata)

    @classmethod
    def load(cls, path: Path) -> VocabMap:
        """Read a map's file, with or without draftcache's metadata.

        Raises InputError, which names the path, where there is no file, the file is no map, or its ids do not hash to
        the recorded hash.
        """
        require_file(path, "a vocabulary map")
        try:
            with safe_open(path, framework="np") as file:
                names, metadata = set(file.keys()), file.metadata() or {}
                if not {"d2t", "t2d"} <= names:
                    raise InputError(f"{path}: expected tensors d2t and t2d, found {sorted(names)}")
                d2t, t2d = file.get_tensor("d2t"), file.get_tensor("t2d")
        except (SafetensorError, OSError) as exc:
            raise InputError(f"{path}: expected safetensors, found something else ({exc})") from exc
        if d2t.dtype != np.int64 or d2t.ndim != 1 or t2d.dtype != np.bool_ or t2d.ndim != 1:
            raise InputError(
                f"{path}: expected d2t int64 [D] and t2d bool [V], "
                f"found {d2t.dtype} {list(d2t.shape)} and {t2d.dtype} {list(t2d.shape)}"
            )
        try:
            details = parse_json(metadata.get(_METADATA_KEY, "{}"))
            recorded, sources = details.get("hash"), tuple(map(str, details.get("sources", ())))
        except (ValueError, TypeError, AttributeError) as exc:
            raise InputError(f"{path}: expected the map's details as JSON, found something else ({exc})") from exc
        return cls._checked(path, d2t, t2d, recorded, sources)

    @classmethod
    def _checked(
        cls, path: Path, d2t: np.ndarray, t2d: np.ndarray, recorded: str | None, sources: tuple[str, ...]
    ) -> VocabMap:
        """Return the map of d2t [D] and t2d [V], which must agree with each other and with the hash `recorded`."""
        try:
            loaded = cls(target_ids=d2t + np.arange(len(d2t)), vocab_size=len(t2d), sources=sources)
        except InputError as exc:
            raise InputError(f"{path}: {exc} (is d2t in offset form, target = i + d2t[i]?)") from exc
        if not np.array_equal(loaded.t2d, t2d):
            raise InputError(
                f"{path}: expected t2d to mark the {len(d2t)} ids of d2t, found {int(t2d.sum())} ids marked, "
                f"{int((loaded.t2d != t2d).sum())} of them differently"
            )
        if recorded is not None and recorded != loaded.hash:
            raise InputError(f"{path}: expected the recorded hash {recorded}, found ids that hash to {loaded.hash}")
        return loaded
