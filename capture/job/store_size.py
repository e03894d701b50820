"""The bytes of a store, computed before anything runs from counts and the schema's row bytes.

Counts of a prepared dataset are exact, and so are the bytes of uncompressed arrays, to the chunk. The bytes of
compressed arrays are estimated by ratios, which are measured on the dataset where it holds the arrays' values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numcodecs import Zstd
from numpy.typing import NDArray

from draftcache.capture.prepare.token_dataset import TokenDataset
from draftcache.store.common.errors import InputError
from draftcache.store.format.array_spec import ROWS_AXIS, TEACHER_AXIS, TOKENS_AXIS, ArraySpec
from draftcache.store.format.channel_scales import ChannelScales
from draftcache.store.format.rows import rows_in_reach, teacher_positions
from draftcache.store.format.schema import INDEX_DTYPE, array_specs
from draftcache.store.format.tap_codecs import tap_codec
from draftcache.store.format.teacher import DraftVocab, TeacherForm
from draftcache.store.layouts.zarr_format import array_metadata

# Compressed bytes per byte, by zstd at level 1, chunk by chunk. The ratio of high planes was 0.37 to 0.40 on states of
# a trained 270M model and on a generator with outlier channels, and 0.30 to 0.385 on the demo's verifier. The other
# ratios were measured on the demo's larger corpus.
HIGH_PLANE_RATIO = 0.385
RATIOS = {"token_ids": 0.355, "argmax": 0.375, "loss_mask": 0.035, "positions": 0.11, "teacher_positions": 0.115}

_CHUNK_EXTRA = 4 + 16  # bytes of the crc32c, and of the chunk's offset and size in the index
_INDEX_CRC = 4
_NPY_HEADER = 128
_TAR_BLOCK = 512
_RATIO_TOKENS = 1 << 20  # about so many tokens of a dataset are compressed to measure the ratios

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """The tokens, rows in reach, teacher positions and shard number of each conversation, all [N]."""

    tokens: FloatArray
    rows: FloatArray
    teacher: FloatArray
    shard: NDArray[np.int64]
    loss_tokens: int
    basis: str
    """Text that says where the counts of rows and teacher positions come from."""
    ratios: Mapping[str, float] = field(default_factory=lambda: RATIOS)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return int(self.shard[-1]) + 1

    def of(self, axis: str) -> FloatArray:
        """Return the length of each conversation on an axis of the schema, [N] float64."""
        return {TOKENS_AXIS: self.tokens, ROWS_AXIS: self.rows, TEACHER_AXIS: self.teacher}[axis]

    def per_shard(self, axis: str) -> FloatArray:
        """Return the sum of `of(axis)` over the conversations of each shard, [shards] float64."""
        return np.bincount(self.shard, weights=self.of(axis), minlength=self.shards).astype(np.float64)

    def to_json(self) -> dict[str, Any]:
        """Return the sums over all conversations, rounded to whole rows, as JSON values.

        The keys are `conversations`, `tokens`, `loss_tokens`, `rows`, `teacher_positions`, `shards` and `basis`.
        """
        return {
            "conversations": len(self.tokens),
            "tokens": round(self.tokens.sum()),
            "loss_tokens": self.loss_tokens,
            "rows": round(self.rows.sum()),
            "teacher_positions": round(self.teacher.sum()),
            "shards": self.shards,
            "basis": self.basis,
        }


def count_dataset(
    dataset: TokenDataset, window: int | None, shard_tokens: int, names: Sequence[str] | None = None
) -> Counts:
    """Return the exact counts of a prepared dataset's splits `names`, by default of all.

    Every mask is read: 450 M tokens in 30,000 conversations take 4 s. Raises InputError for a dataset without
    conversations.
    """
    splits = [dataset.split(name) for name in names or dataset.splits if len(dataset.split(name))]
    if not splits:
        raise InputError(f"{dataset.path}: expected a prepared dataset with conversations, found none")
    lengths = [split.conversations["tokens"].astype(np.float64) for split in splits]
    step = 1 + int(sum(part.sum() for part in lengths)) // _RATIO_TOKENS
    rows, teacher, ratios = [], [], _MeasuredRatios()
    for split in splits:
        for number in range(len(split)):
            token_ids, mask, _ = split[number]
            reached, taught = rows_in_reach(mask, window), teacher_positions(mask)
            rows.append(reached.size)
            teacher.append(taught.size)
            if number % step == 0:
                ratios.add(token_ids, mask, reached, taught)
    return Counts(
        tokens=np.concatenate(lengths),
        rows=np.array(rows, np.float64),
        teacher=np.array(teacher, np.float64),
        shard=shard_numbers(lengths, shard_tokens),
        loss_tokens=sum(int(split.conversations["loss_tokens"].sum()) for split in splits),
        basis="exact, of the prepared dataset",
        ratios=ratios.finish(),
    )


class _MeasuredRatios:
    """Compresses the arrays that are known from a prepared dataset as a shard would, to measure their ratios."""

    def __init__(self) -> None:
        self._parts: dict[str, list[NDArray[Any]]] = {name: [] for name in RATIOS}

    def add(self, token_ids: NDArray[Any], mask: NDArray[Any], rows: NDArray[Any], taught: NDArray[Any]) -> None:
        columns = {
            "token_ids": token_ids,
            "loss_mask": mask.astype(np.uint8),
            "positions": rows.astype(np.int32),
            "teacher_positions": taught.astype(np.int32),
            "argmax": token_ids[taught + 1],  # the verifier's choice compresses like the token that was written
        }
        for name, values in columns.items():
            self._parts[name].append(values)

    def finish(self) -> dict[str, float]:
        found = dict(RATIOS)
        for name, parts in self._parts.items():
            values = np.ascontiguousarray(np.concatenate(parts))
            if values.size:
                codec, step = Zstd(level=1), ArraySpec(axis=TOKENS_AXIS, dtype=values.dtype.name).chunk_rows
                chunks = range(0, len(values), step)
                found[name] = sum(len(codec.encode(values[at : at + step])) for at in chunks) / values.nbytes
        return found


def shard_numbers(splits: Iterable[FloatArray], shard_tokens: int) -> NDArray[np.int64]:
    """Return the shard of each conversation, by capture's rule: shards are filled in order, and none spans two splits.

    The result is [N] int64.
    """
    numbers, shard = [], 0
    for lengths in splits:
        filled = 0.0
        for length in lengths.tolist():
            numbers.append(shard)
            filled += length
            if filled >= shard_tokens:
                shard, filled = shard + 1, 0.0
        shard += filled > 0
    return np.array(numbers, np.int64)


def specs_of(mode: str, *, layers: Sequence[int], hidden_size: int, teacher: TeacherForm) -> dict[str, ArraySpec]:
    """Return the arrays of a shard by name. int8's channel scales are placeholders: they do not affect sizes."""
    scales = ChannelScales({layer: np.ones(hidden_size, np.float32) for layer in layers})
    codec = tap_codec(mode, layers=layers, hidden_size=hidden_size, channel_scales=scales)
    return array_specs(codec=codec, teacher=teacher)


def sized_teacher(
    kind: str, *, top_k: int, vocab_size: int, hidden_size: int, compute_dtype: str, draft_vocab_sizes: Sequence[int]
) -> TeacherForm:
    """Return the form of a teacher whose vocabularies are known by size alone. It affects no sizes which ids they hold.

    The first of `draft_vocab_sizes` is the main vocabulary's.
    """
    main, *more = draft_vocab_sizes
    return TeacherForm(
        kind=kind,
        top_k=top_k,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        compute_dtype=compute_dtype,
        vocabularies=(DraftVocab(size=main, hash=""), *map(DraftVocab.further, more)),
    )


def shard_bytes(counts: Counts, specs: Mapping[str, ArraySpec], layout: str) -> dict[str, float]:
    """Return the bytes of all shards' files: each array with its overhead, `index.npy`, the layout's other files."""
    measure = _zarr_bytes if layout == "zarr" else _tar_bytes
    found = {name: measure(counts, name, spec) for name, spec in specs.items()}
    found["index.npy"] = float(counts.shards * _NPY_HEADER + len(counts.tokens) * INDEX_DTYPE.itemsize)
    if layout != "zarr":
        about = 130 + 56 * len(specs)  # bytes of samples.json, with a hash per array
        found["samples.json"] = float(len(counts.tokens) * _TAR_BLOCK * (1 + -(-about // _TAR_BLOCK)))
        found["members.npy"] = float(counts.shards * 3 * _NPY_HEADER + len(counts.tokens) * (8 + 20 * len(specs)))
    return found


def _ratio(counts: Counts, name: str) -> float:
    return HIGH_PLANE_RATIO if name.endswith("_hi") else counts.ratios.get(name, 1.0)


def _zarr_bytes(counts: Counts, name: str, spec: ArraySpec) -> float:
    rows = counts.per_shard(spec.axis)
    chunks = np.ceil(rows / spec.chunk_rows)
    stored = rows * _ratio(counts, name) if spec.compress else chunks * spec.chunk_rows  # the last chunk is padded
    payload = stored * spec.row_bytes
    metadata = len(json.dumps(array_metadata(spec, round(rows.mean())), indent=2)) + 1
    return float((payload + chunks * _CHUNK_EXTRA + _INDEX_CRC * (rows > 0) + metadata).sum())


def _tar_bytes(counts: Counts, name: str, spec: ArraySpec) -> float:
    """Return the bytes of an array's tar members: each has a header block and the .npy file, padded to whole blocks."""
    members = _NPY_HEADER + counts.of(spec.axis) * spec.row_bytes
    if spec.compress:
        members = members * _ratio(counts, name)
    return float((_TAR_BLOCK + np.ceil(members / _TAR_BLOCK) * _TAR_BLOCK).sum())


def frozen_bytes(
    hidden_size: int, vocab_size: int, draft_vocab_sizes: Sequence[int], compute_dtype: str = "bfloat16"
) -> int:
    """Return the bytes of the frozen weights, which are in the dtype of the capture, and the vocabulary maps.

    The weights are the embeddings, the final norm and each draft vocabulary's rows of the head.
    """
    itemsize = 4 if compute_dtype == "float32" else 2
    maps = sum(itemsize * hidden_size * size + 8 * size + vocab_size for size in draft_vocab_sizes)
    return itemsize * hidden_size * (vocab_size + 1) + maps
