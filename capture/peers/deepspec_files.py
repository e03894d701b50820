"""DeepSpec's target cache: raw arrays of many conversations one behind the other, found by an index.

By the public source of DeepSpec (deepspec/data/target_cache_dataset.py, deepspec/modeling/target_extract.py):

- `manifest.json` of version 2 names the verifier, its hidden size H, the dtype of states, `target_layer_ids` and the
  shards. A layer id k is block k, whose own output is stored even if it is the last one, and -1 the embeddings.
- `samples.idx` has one record of 56 bytes per conversation, in their order.
- `shard-NNNNN.bin` has for each conversation of L tokens `input_ids` [L] int32, `attention_mask` [L] uint8, `loss_mask`
  [L] uint8, the states of N layers [L, N * H], and the last state [L, H]: transformers' `last_hidden_state`, so from
  after the final norm. States are bfloat16, or float8 without a scale, which DeepSpec's reader casts to bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from draftcache.capture.peers.samples import (
    CacheDescription,
    DamagedSampleError,
    PeerSample,
    SetAside,
    block_numbers,
    mask_of,
    read_manifest,
    require_sample,
)
from draftcache.store.common.errors import InputError

MANIFEST, INDEX, VERSION = "manifest.json", "samples.idx", 2
RECORD = np.dtype(
    [("sample_id", "<u8"), ("shard_id", "<u4"), ("length", "<u4")]
    + [(name, "<u8") for name in ("token_ids", "attention_mask", "loss_mask", "states", "last_state")]
)
"""One conversation: its number, its shard, its tokens, and where in the shard each of its arrays begins, in bytes."""
_STORED: dict[str, tuple[DTypeLike, torch.dtype]] = {
    "bfloat16": ("<u2", torch.bfloat16),
    "float8_e4m3fn": ("u1", torch.float8_e4m3fn),
    "float8_e5m2": ("u1", torch.float8_e5m2),
}
"""By the name that the manifest has for it: the dtype in which numpy reads a state, and the one that it is."""
_FIELDS = {
    "version": int, "num_samples": int, "target_layer_ids": list, "hidden_dtype": str, "token_dtype": str,
    "mask_dtype": str, "index_record_size": int, "hidden_size": int, "shards": list,
}  # fmt: skip


@dataclass(frozen=True)
class _Cache:
    """What a manifest and its index say."""

    shards: list[Path]
    hidden_size: int
    hidden_dtype: str
    layer_ids: list[int]
    records: NDArray[Any]
    """RECORD of every conversation."""
    described: CacheDescription

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Which records are at their own number's place and name a shard that there is."""
        numbers = np.arange(len(self.records))
        usable: NDArray[np.bool_] = (self.records["sample_id"] == numbers) & (
            self.records["shard_id"] < len(self.shards)
        )
        return usable


class DeepSpecReader:
    """Reads DeepSpec's target caches. Implements `PeerReader`."""

    name = "deepspec"
    last_state = "after"

    def files(self, source: Path) -> list[Path]:
        """The index and the shards that the manifest names. Raises InputError where it can't be read."""
        return [source / INDEX, *_read_cache(source).shards]

    def describe(self, source: Path) -> CacheDescription:
        """The verifier and the blocks by the manifest. Raises InputError where it can't be read."""
        return _read_cache(source).described

    def read(self, path: Path) -> Iterator[PeerSample | SetAside]:
        """The conversations of a shard, or the records of the index that belong to none. Raises DamagedSampleError."""
        cache = _read_cache(path.parent)
        if path.name == INDEX:
            yield from _lost_records(cache, path)
            return
        if not path.is_file():
            raise DamagedSampleError(f"{path}: expected the shard that {MANIFEST} names, found no file")
        shard = cache.shards.index(path)
        with path.open("rb") as file:
            for number in np.flatnonzero(cache.usable & (cache.records["shard_id"] == shard)).tolist():
                named = path.with_name(f"{path.name}#{number}")
                try:
                    yield _read_sample(cache, cache.records[number], file, path, named)
                except DamagedSampleError as exc:
                    yield SetAside.of(named, exc)


def _read_cache(source: Path) -> _Cache:
    """The manifest and the index of a folder. Raises InputError."""
    path = source / MANIFEST
    values = read_manifest(path, _FIELDS)
    expected = {"version": VERSION, "token_dtype": "int32", "mask_dtype": "uint8", "index_record_size": RECORD.itemsize}
    found = {name: values[name] for name in expected}
    if found != expected:
        raise InputError(f"{path}: expected a DeepSpec cache of {expected}, found {found}")
    if values["hidden_dtype"] not in _STORED:
        raise InputError(f"{path}: expected hidden_dtype as one of {list(_STORED)}, found {values['hidden_dtype']!r}")
    named = [shard if isinstance(shard, dict) else {} for shard in values["shards"]]
    names = [shard.get("file_name") for shard in named]
    if not all(isinstance(name, str) and Path(name).name == name for name in names) or len(set(names)) < len(names):
        raise InputError(f"{path}: expected shards, each with a file_name of its own in this folder, found {names[:5]}")
    if (numbers := [shard.get("shard_id") for shard in named]) != list(range(len(named))):
        raise InputError(f"{path}: expected shards with a shard_id from 0 in their order, found {numbers[:5]}")
    layer_ids = block_numbers(path, values["target_layer_ids"])
    index = source / INDEX
    if not index.is_file():
        raise InputError(f"{index}: expected the index of {values['num_samples']} conversations, found no file")
    count = min(index.stat().st_size // RECORD.itemsize, values["num_samples"])
    return _Cache(
        shards=[source / str(name) for name in names],
        hidden_size=values["hidden_size"],
        hidden_dtype=values["hidden_dtype"],
        layer_ids=layer_ids,
        records=np.fromfile(index, RECORD, count),
        described=CacheDescription(
            verifier=str(values.get("target_model_name_or_path", "")),
            layers=tuple(layer for layer in layer_ids if layer >= 0),
            left_out=("the embeddings (layer id -1)",) if -1 in layer_ids else (),
        ),
    )


def _lost_records(cache: _Cache, index: Path) -> Iterator[SetAside]:
    """What of the index is in no shard, and whether the index itself is cut."""
    promised = read_manifest(index.with_name(MANIFEST), _FIELDS)["num_samples"]
    if index.stat().st_size != promised * RECORD.itemsize:
        yield SetAside(
            str(index),
            f"expected {promised} records of {RECORD.itemsize} bytes, as {MANIFEST} says, found "
            f"{index.stat().st_size} bytes",
        )
    for number in np.flatnonzero(~cache.usable).tolist():
        record = cache.records[number]
        yield SetAside(
            f"{index}#{number}",
            f"expected conversation {number} in one of {len(cache.shards)} shards, found the record of conversation "
            f"{record['sample_id']} in shard {record['shard_id']}",
        )


def _read_sample(cache: _Cache, record: NDArray[Any], file: IO[bytes], path: Path, named: Path) -> PeerSample:
    length, width, taps = int(record["length"]), cache.hidden_size, len(cache.layer_ids)
    stored, dtype = _STORED[cache.hidden_dtype]
    state_bytes, size = np.dtype(stored).itemsize * length * width, path.stat().st_size
    lengths = {"token_ids": 4 * length, "attention_mask": length, "loss_mask": length}
    for name, nbytes in (lengths | {"states": taps * state_bytes, "last_state": state_bytes}).items():
        if (end := int(record[name]) + nbytes) > size:
            raise DamagedSampleError(f"{named}: expected its {name} to end at byte {end}, found a file of {size} bytes")
    attention = _read(file, int(record["attention_mask"]), "u1", length, named)
    if not attention.all():
        raise DamagedSampleError(f"{named}: expected attention to all of its {length} tokens, found {attention.sum()}")
    first, states_at, last_at = taps - len(cache.described.layers), int(record["states"]), int(record["last_state"])

    def load() -> tuple[Tensor, Tensor]:
        try:
            with path.open("rb") as shard:
                states = _read(shard, states_at, stored, length * taps * width, named)
                last = _read(shard, last_at, stored, length * width, named)
        except OSError as exc:
            raise DamagedSampleError(f"{named}: expected the shard as it was when the import began ({exc})") from exc
        aux = torch.from_numpy(states).view(dtype).reshape(length, taps, width)[:, first:]
        return aux.to(torch.bfloat16), torch.from_numpy(last).view(dtype).reshape(length, width).to(torch.bfloat16)

    return require_sample(
        PeerSample(
            path=named,
            token_ids=_read(file, int(record["token_ids"]), "<i4", length, named).astype(np.int64),
            loss_mask=mask_of(named, torch.from_numpy(_read(file, int(record["loss_mask"]), "u1", length, named))),
            dtype=torch.bfloat16,
            taps=taps - first,
            hidden_size=width,
            before_norm=None,
            load=load,
        ),
        (length,),
    )


def _read(file: IO[bytes], offset: int, dtype: DTypeLike, count: int, named: Path) -> NDArray[Any]:
    """`count` values at an offset in bytes. Raises DamagedSampleError where the file ends before."""
    file.seek(offset)
    found = np.fromfile(file, dtype, count)
    if len(found) != count:
        raise DamagedSampleError(f"{named}: expected {count} values at byte {offset}, found {len(found)}")
    return found
