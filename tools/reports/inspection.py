"""What a store holds, as JSON values: the whole of it without reading an array, or one conversation decoded."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftcache.store.common.errors import InputError
from draftcache.store.common.files import hash_json
from draftcache.store.format.array_spec import tap_name
from draftcache.store.format.bf16 import bf16_to_float32
from draftcache.store.format.commits import COMMIT_DIRECTORY, Record, record_name, require_record
from draftcache.store.format.norm_band import NormBand
from draftcache.store.format.schema import Conversation
from draftcache.store.reader import StoreReader
from draftcache.store.storage.base import Location, Storage
from draftcache.tools.reports.shown_teacher import shown_teacher

DEFAULT_ROWS = 64
_REMOTE_READS = 16  # records that are fetched at once from an object store
_SEAL = "xxh3_128"  # as `draftcache.store.common.sealed_json` writes it

Summary = dict[str, Any]


def summarise(location: Location, *, allow_partial: bool = False) -> Summary:
    """Figures of a store from its manifest, commit records and index alone.

    Raises StoreError where it is unfinished (unless `allow_partial`) or a record is damaged. Bytes are those that the
    commit records name; `verify` compares them with the files.
    """
    reader = StoreReader(location, allow_partial=allow_partial)
    try:
        totals = _Totals()
        for name, record in _records(reader.storage):
            totals.add(name, record)
        return _manifest_figures(reader) | _index_figures(reader) | totals.figures(int(reader.index["tokens"].sum()))
    finally:
        reader.close()


def _records(storage: Storage) -> Iterator[tuple[str, Record]]:
    """Stem and content of every commit record, in the order of their names."""
    stems = [name.rpartition("/")[2].removesuffix(".json") for name in storage.list(COMMIT_DIRECTORY)]
    if storage.local_root is not None:
        yield from ((stem, _record(storage, stem)) for stem in stems)
        return
    with ThreadPoolExecutor(_REMOTE_READS) as pool:
        yield from zip(stems, pool.map(lambda stem: _record(storage, stem), stems), strict=True)


def _record(storage: Storage, stem: str) -> Record:
    """A commit record, the hash of its values checked: comparing the text too would take 4 times as long."""
    try:
        value = json.loads(storage.read(record_name(stem)))
        if value.pop(_SEAL) == hash_json(value) and isinstance(value["files"], dict):
            return dict(value)
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    return require_record(storage, stem)  # says what is wrong with it


@dataclass
class _Totals:
    """Sums over commit records."""

    shards: int = 0
    file_bytes: dict[str, int] = field(default_factory=dict)
    """By name within the shard, over all shards."""
    other_bytes: dict[str, int] = field(default_factory=dict)
    tails: list[dict[str, Any]] = field(default_factory=list)
    norms: dict[str, NormBand] = field(default_factory=dict)
    quarantined: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, record: Record) -> None:
        """Count one record."""
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

    def figures(self, tokens: int) -> Summary:
        """Bytes by array (by file where an array has none of its own), tail mass, norms and what was set aside."""
        arrays: dict[str, int] = {}
        for file, size in self.file_bytes.items():
            # Arrays of a zarr shard are directories: ARRAY/c.0.0 and ARRAY/zarr.json. Tar shards have files only.
            key = file.partition("/")[0] if "/" in file else file
            arrays[key] = arrays.get(key, 0) + size
        shard_bytes = sum(arrays.values())
        return {
            "shards_committed": self.shards,
            "bytes": {
                "total": shard_bytes + sum(self.other_bytes.values()),
                "shards": shard_bytes,
                "per_token": _ratio(shard_bytes, tokens),
                "arrays": {
                    name: {"bytes": size, "per_token": _ratio(size, tokens)}
                    for name, size in sorted(arrays.items(), key=lambda item: -item[1])
                },
                "files": self.other_bytes,
            },
            "tail_mass": self._tail_mass(),
            "tap_norms": self._tap_norms(),
            "quarantined": self.quarantined,
        }

    def _tail_mass(self) -> Summary | None:
        count = sum(item["count"] for item in self.tails)
        if not count:
            return None
        return {
            "count": count,
            "mean": sum(item["count"] * item["mean"] for item in self.tails) / count,
            "max_p99": max(item["p99"] for item in self.tails),
        }

    def _tap_norms(self) -> dict[str, Summary]:
        """Geometric mean and spread of conversations' rms: the gates add up its logarithm shard by shard."""
        norms = {}
        for layer, band in self.norms.items():
            if band.count:
                mean = band.total / band.count
                sigma = math.sqrt(max(band.squares / band.count - mean * mean, 0.0))
                norms[layer] = {"conversations": band.count, "rms": math.exp(mean), "log_sigma": sigma}
        return norms


def _manifest_figures(reader: StoreReader) -> Summary:
    manifest = reader.manifest
    return {
        "store": reader.location,
        "manifest_hash": manifest.hash,
        "verifier": manifest.verifier,
        "taps": [tap.to_json() for tap in manifest.taps],
        "mode": manifest.mode,
        "layout": manifest.layout,
        "compute_dtype": manifest.compute_dtype,
        "window": manifest.window,
        "teacher": manifest.teacher,
        "top_k": manifest.top_k,
        "draft_vocab_size": manifest.draft_vocab_size,
        "draft_vocab_hash": manifest.draft_vocab_hash,
        "more_draft_vocabs": manifest.more_draft_vocabs,
        "ssm": manifest.ssm,
        "provenance": manifest.provenance,
        "shards_planned": manifest.shards,
    }


def _index_figures(reader: StoreReader) -> Summary:
    index = reader.index
    tokens, rows = int(index["tokens"].sum()), int(index["rows"].sum())
    splits = {}
    for number, name in enumerate(reader.manifest.splits):
        part = index[index["split"] == number]
        splits[name] = {"conversations": len(part), "tokens": int(part["tokens"].sum())}
    return {
        "conversations": len(index),
        "tokens": tokens,
        "loss_tokens": int(index["loss_tokens"].sum()),
        "loss_fraction": _ratio(int(index["loss_tokens"].sum()), tokens),
        "rows": rows,
        "reach_saved": 1 - rows / tokens if tokens else 0.0,
        "teacher_positions": int(index["teacher_rows"].sum()),
        "splits": splits,
        "lengths": _lengths(index["tokens"]),
    }


def _lengths(tokens: NDArray[np.int64]) -> Summary:
    """Of conversations, in tokens: quantiles, and counts in bins [2^n, 2^(n+1))."""
    if not len(tokens):
        return {"bins": []}
    p50, p90 = np.quantile(tokens, [0.5, 0.9])
    powers = np.frexp(np.maximum(tokens, 1).astype(np.float64))[1] - 1
    counts = np.bincount(powers)
    first = int(powers.min())
    return {
        "min": int(tokens.min()),
        "mean": float(tokens.mean()),
        "p50": float(p50),
        "p90": float(p90),
        "max": int(tokens.max()),
        "bins": [
            {"from": 1 << power, "to": 2 << power, "count": int(counts[power])} for power in range(first, len(counts))
        ],
    }


def find_conversation(reader: StoreReader, split: str, dataset_index: int) -> int:
    """Number in the store's index of a conversation of the prepared dataset. Raises InputError with what there is."""
    members = reader.members(split)
    numbers = reader.index["dataset_index"][members]
    found = members[numbers == dataset_index]
    if not len(found):
        there = f"{numbers.min()} .. {numbers.max()}" if len(numbers) else "none"
        inside = len(numbers) > 0 and numbers.min() <= dataset_index <= numbers.max()
        raise InputError(
            f"{reader.location}: expected --index among the stored conversations of {split!r} ({there}), found "
            f"{dataset_index}" + ("; capture set this one aside, or has not stored it yet" if inside else "")
        )
    return int(found[0])


def decode_conversation(
    reader: StoreReader,
    number: int,
    *,
    rows: tuple[int, int] | None = None,
    text: Callable[[int], str] | None = None,
) -> Summary:
    """Tokens `rows` (a, b), default the first 64, of conversation `number` with all that is stored at each.

    `text` gives a token id's text. A token's `taps` is None where its row was out of reach; `teacher` is None where
    the position carries no loss, and is about the token that follows. Raises InputError naming the valid range.
    """
    if not 0 <= number < len(reader):
        raise InputError(f"{reader.location}: expected a conversation in 0 .. {len(reader) - 1}, found {number}")
    row = reader.index[number]
    length = int(row["tokens"])
    first, last = rows or (0, min(DEFAULT_ROWS, length))
    if not 0 <= first < last <= length:
        raise InputError(
            f"{reader.location}: expected --rows A,B with 0 <= A < B <= {length} for conversation {number}, "
            f"found {first},{last}"
        )
    item = reader.read(number, tokens=(first, last))
    norms, teacher = _tap_rms(reader, item), shown_teacher(reader, item, text)
    ids, mask = item.arrays["token_ids"].tolist(), item.loss_mask.tolist()
    return {
        "store": reader.location,
        "conversation": number,
        "split": reader.manifest.splits[item.split],
        "dataset_index": item.dataset_index,
        "content_hash": item.content_hash,
        "shard": int(row["shard"]),
        **{name: int(row[name]) for name in ("tokens", "loss_tokens", "rows", "teacher_rows")},
        "layers": list(reader.manifest.layers),
        "shown": [first, last],
        "table": [
            {
                "position": position,
                "token_id": token_id,
                "text": None if text is None else text(token_id),
                "loss": loss,
                "taps": norms.get(position),
                "teacher": teacher.get(position),
            }
            for position, token_id, loss in zip(range(first, last), ids, mask, strict=True)
        ],
    }


def _tap_rms(reader: StoreReader, item: Conversation) -> dict[int, dict[str, float]]:
    """{position: {layer: rms over the hidden size}} of the rows that are stored."""
    columns = {}
    for layer in reader.manifest.layers:
        states = item.arrays[tap_name(layer)]
        values = states if states.dtype == np.float32 else bf16_to_float32(states)
        columns[str(layer)] = np.sqrt(np.square(values, dtype=np.float64).mean(axis=1)).tolist()
    positions = item.arrays["positions"].tolist()
    return {position: {layer: columns[layer][at] for layer in columns} for at, position in enumerate(positions)}


def token_text(directory: Path) -> Callable[[int], str]:
    """Text of single token ids by the tokenizer in a directory. Raises InputError where there is none."""
    if not directory.is_dir():
        raise InputError(f"{directory}: expected a directory with a tokenizer, found none")
    if (directory / "tokenizer.json").is_file():  # without transformers: a second faster
        from tokenizers import Tokenizer

        backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
        return lambda token_id: str(backend.decode([token_id], skip_special_tokens=False))
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory))
    except (OSError, ValueError) as exc:
        raise InputError(f"{directory}: expected a tokenizer, could not load one ({exc})") from exc
    return lambda token_id: str(tokenizer.decode([token_id], skip_special_tokens=False))


def _ratio(value: int, total: int) -> float:
    return value / total if total else 0.0
