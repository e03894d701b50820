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
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from draftcache.capture.peers.samples import (
    CacheDescription,
    DamagedSampleError,
    PeerCache,
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


class DeepSpecReader:
    """Reads DeepSpec's target caches. Implements `PeerReader`."""

    name = "deepspec"
    last_state = "after"

    def open(self, source: Path) -> PeerCache:
        """The index and the shards that the manifest names. Raises InputError where it or the index can't be read."""
        cache = _Cache(source)
        return PeerCache(files=[cache.index, *cache.shards], read=cache.read, description=cache.description)


class _Cache:
    """A manifest, its index and its shards."""

    def __init__(self, source: Path) -> None:
        """Raises InputError where manifest or index can't be read."""
        path = source / MANIFEST
        values = read_manifest(path, _FIELDS)
        expected = {
            "version": VERSION, "token_dtype": "int32", "mask_dtype": "uint8", "index_record_size": RECORD.itemsize,
        }  # fmt: skip
        found = {name: values[name] for name in expected}
        if found != expected:
            raise InputError(f"{path}: expected a DeepSpec cache of {expected}, found {found}")
        if (kind := values["hidden_dtype"]) not in _STORED:
            raise InputError(f"{path}: expected hidden_dtype as one of {list(_STORED)}, found {kind!r}")
        layer_ids = block_numbers(path, values["target_layer_ids"])
        self.index, self.shards = source / INDEX, _shards(path, values["shards"])
        if not self.index.is_file():
            raise InputError(
                f"{self.index}: expected the index of {values['num_samples']} conversations, found no file"
            )
        self.description = CacheDescription(
            verifier=str(values.get("target_model_name_or_path", "")),
            layers=tuple(layer for layer in layer_ids if layer >= 0),
            left_out=("the embeddings (layer id -1)",) if -1 in layer_ids else (),
        )
        self._promised, self._width, self._taps = values["num_samples"], values["hidden_size"], len(layer_ids)
        self._stored, self._dtype = _STORED[kind]
        count = min(self.index.stat().st_size // RECORD.itemsize, self._promised)
        self._records = np.fromfile(self.index, RECORD, count)
        self._usable = (self._records["sample_id"] == np.arange(count)) & (self._records["shard_id"] < len(self.shards))
        """Which records are at their own number's place and name a shard that there is."""

    def read(self, path: Path) -> Iterator[PeerSample | SetAside]:
        """The conversations of a shard, or the records of the index that belong to none. Raises DamagedSampleError."""
        if path == self.index:
            yield from self._lost_records()
            return
        if not path.is_file():
            raise DamagedSampleError(f"{path}: expected the shard that {MANIFEST} names, found no file")
        of_shard = self._usable & (self._records["shard_id"] == self.shards.index(path))
        with path.open("rb") as file:
            for number in np.flatnonzero(of_shard).tolist():
                named = path.with_name(f"{path.name}#{number}")
                try:
                    yield self._sample(self._records[number], file, path, named)
                except DamagedSampleError as exc:
                    yield SetAside.of(named, exc)

    def _lost_records(self) -> Iterator[SetAside]:
        """What of the index is in no shard, and whether the index itself is cut."""
        wanted, size = self._promised * RECORD.itemsize, self.index.stat().st_size
        if size != wanted:
            yield SetAside(
                str(self.index),
                f"expected {self._promised} records of {RECORD.itemsize} bytes, as {MANIFEST} says, found {size} bytes",
            )
        for number in np.flatnonzero(~self._usable).tolist():
            record = self._records[number]
            yield SetAside(
                f"{self.index}#{number}",
                f"expected conversation {number} in one of {len(self.shards)} shards, found the record of conversation "
                f"{record['sample_id']} in shard {record['shard_id']}",
            )

    def _sample(self, record: NDArray[Any], file: IO[bytes], path: Path, named: Path) -> PeerSample:
        length, width, taps, stored, dtype = int(record["length"]), self._width, self._taps, self._stored, self._dtype
        state_bytes, size = np.dtype(stored).itemsize * length * width, path.stat().st_size
        lengths = {"token_ids": 4 * length, "attention_mask": length, "loss_mask": length}
        for name, nbytes in (lengths | {"states": taps * state_bytes, "last_state": state_bytes}).items():
            if (end := int(record[name]) + nbytes) > size:
                raise DamagedSampleError(
                    f"{named}: expected its {name} to end at byte {end}, found a file of {size} bytes"
                )
        attention = _read(file, int(record["attention_mask"]), "u1", length, named)
        if not attention.all():
            raise DamagedSampleError(
                f"{named}: expected attention to all of its {length} tokens, found {attention.sum()}"
            )
        first = taps - len(self.description.layers)
        states_at, last_at = int(record["states"]), int(record["last_state"])

        def load() -> tuple[Tensor, Tensor]:
            try:
                with path.open("rb") as shard:
                    states = _read(shard, states_at, stored, length * taps * width, named)
                    last = _read(shard, last_at, stored, length * width, named)
            except OSError as exc:
                raise DamagedSampleError(
                    f"{named}: expected the shard as it was when the import began ({exc})"
                ) from exc
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


def _shards(path: Path, listed: list[Any]) -> list[Path]:
    """The shards of a manifest, by their numbers. Raises InputError."""
    named = [shard if isinstance(shard, dict) else {} for shard in listed]
    names = [shard.get("file_name") for shard in named]
    if not all(isinstance(name, str) and Path(name).name == name for name in names) or len(set(names)) < len(names):
        raise InputError(f"{path}: expected shards, each with a file_name of its own in this folder, found {names[:5]}")
    if (numbers := [shard.get("shard_id") for shard in named]) != list(range(len(named))):
        raise InputError(f"{path}: expected shards with a shard_id from 0 in their order, found {numbers[:5]}")
    return [path.with_name(str(name)) for name in names]


def _read(file: IO[bytes], offset: int, dtype: DTypeLike, count: int, named: Path) -> NDArray[Any]:
    """`count` values at an offset in bytes. Raises DamagedSampleError where the file ends before."""
    file.seek(offset)
    found = np.fromfile(file, dtype, count)
    if len(found) != count:
        raise DamagedSampleError(f"{named}: expected {count} values at byte {offset}, found {len(found)}")
    return found
