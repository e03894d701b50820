"""NeMo Automodel's cache of a verifier's states, as its DSpark trainer reads it: safetensors shards of padded rows.

By the source of nemo-automodel 0.7 (components/datasets/llm/dspark_cache.py, speculative/dspark/target.py):

- `manifest.json` of format version 1 names the verifier, its hidden size H and `target_layer_ids`. A layer id k is the
  output of block k, -1 the embeddings, and the last block's id stands for the final norm's output instead of its own.
- `shard-NNNNNN.safetensors` has for n conversations, padded to S tokens, `input_ids` [n, S], `loss_mask` [n, S], the
  states of N layers `target_hidden_states` [n, S, N * H], and `target_last_hidden_states` [n, S, H], from after the
  final norm. Earlier versions have `attention_mask` [n, S] too; without it the length of a row is not said.
- `target_weights.safetensors` has the verifier's embeddings and head.

The cache of its Eagle3 trainer is another one: it has no last state, but probabilities over its own draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from draftcache.capture.peers.safetensors_files import DTYPES
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
from draftcache.capture.peers.verifier_parts import VerifierParts
from draftcache.store.common.errors import InputError

MANIFEST, WEIGHTS, VERSION = "manifest.json", "target_weights.safetensors", 1
_FIELDS = {
    "format_version": int, "target_model": str, "hidden_size": int, "num_hidden_layers": int, "num_samples": int,
    "shard_size": int, "target_layer_ids": list,
}  # fmt: skip
_STATES, _LAST = "target_hidden_states", "target_last_hidden_states"
_LEADING_PADS = 3
"""Equal tokens without loss at the start of a row, from which on they are taken for padding."""


class AutomodelReader:
    """Reads the caches of Automodel's DSpark trainer. Implements `PeerReader`."""

    name = "automodel"
    last_state = "after"

    def open(self, source: Path) -> PeerCache:
        """The shards that the manifest promises. Raises InputError where it can't be read, or for an Eagle3 cache."""
        manifest = _read_manifest(source)
        count = -(-manifest["num_samples"] // manifest["shard_size"])
        paths = [source / f"shard-{number:06d}.safetensors" for number in range(count)]
        if more := sorted({path.name for path in source.glob("shard-*.safetensors")} - {path.name for path in paths}):
            raise InputError(
                f"{source / MANIFEST}: expected {count} shards, of {manifest['num_samples']} conversations, found "
                f"{len(more)} more: {more[:3]}: take away what is not of this cache"
            )
        ids, last, weights = manifest["target_layer_ids"], manifest["num_hidden_layers"] - 1, source / WEIGHTS
        unusable = {-1: "the embeddings (layer id -1)", last: f"the final norm's output (layer id {last})"}
        described = CacheDescription(
            verifier=manifest["target_model"],
            layers=tuple(layer for layer in ids if layer not in unusable),
            left_out=tuple(unusable[layer] for layer in ids if layer in unusable),
            weights=weights if weights.is_file() else None,
        )
        places = [ids.index(layer) for layer in described.layers]
        return PeerCache(files=paths, read=lambda path: _read(path, manifest, places), description=described)


def _read(path: Path, manifest: dict[str, Any], places: list[int]) -> Iterator[PeerSample | SetAside]:
    """The conversations of a shard, without their padding; `places` are those of the states that are blocks' outputs.

    Raises DamagedSampleError.
    """
    if not path.is_file():
        raise DamagedSampleError(f"{path}: expected the shard that {MANIFEST} promises, found no file")
    try:
        with safe_open(path, framework="pt") as file:
            count, dtype = _require_shapes(path, file, manifest)
            ids, mask = file.get_tensor("input_ids").numpy(), file.get_tensor("loss_mask")
            masked = "attention_mask" in set(file.keys())
            attention = file.get_tensor("attention_mask").numpy() if masked else None
    except (SafetensorError, OSError) as exc:
        raise DamagedSampleError(f"{path}: expected a whole safetensors file, found another ({exc})") from exc
    for row in range(count):
        named = path.with_name(f"{path.name}#{row}")
        try:
            loss = mask_of(named, mask[row])
            length = _length(named, ids[row], loss, None if attention is None else attention[row])
            yield require_sample(
                PeerSample(
                    path=named,
                    token_ids=ids[row, :length].astype(np.int64),
                    loss_mask=loss[:length],
                    dtype=dtype,
                    taps=len(places),
                    hidden_size=manifest["hidden_size"],
                    before_norm=None,
                    load=_StatesOf(path, row, length, places),
                ),
                (length,),
            )
        except DamagedSampleError as exc:
            yield SetAside.of(named, exc)
    first = int(path.stem.removeprefix("shard-")) * manifest["shard_size"]
    promised = min(manifest["shard_size"], manifest["num_samples"] - first)
    if count != promised:
        yield SetAside(str(path), f"expected {promised} conversations, as {MANIFEST} says, found {count}")


def require_same_weights(parts: VerifierParts, path: Path) -> None:
    """Compare the embeddings and the head beside a cache with the verifier's, in bfloat16. Raises InputError."""
    try:
        with safe_open(path, framework="pt") as file:
            for name, own in (("embed_tokens.weight", parts.embeddings.weight), ("lm_head.weight", parts.head.weight)):
                theirs = file.get_tensor(name)
                if theirs.shape != own.shape or not torch.equal(theirs.bfloat16(), own.detach().cpu().bfloat16()):
                    raise InputError(
                        f"{path}: expected the verifier's own {name} {list(own.shape)}, found another "
                        f"{list(theirs.shape)}: the cache is of another verifier than --verifier"
                    )
    except (SafetensorError, OSError) as exc:
        raise InputError(f"{path}: expected a whole safetensors file, found another ({exc})") from exc


class _StatesOf:
    """Reads the states of one row of a shard. Implements `LoadStates`."""

    def __init__(self, path: Path, row: int, length: int, places: list[int]) -> None:
        self._path, self._row, self._length, self._places = path, row, length, places

    def __call__(self) -> tuple[Tensor, Tensor]:
        try:
            with safe_open(self._path, framework="pt") as file:
                aux, last = (file.get_slice(name)[self._row, : self._length] for name in (_STATES, _LAST))
        except (SafetensorError, OSError) as exc:
            raise DamagedSampleError(f"{self._path}: expected a whole safetensors file, found another ({exc})") from exc
        return aux.reshape(self._length, -1, last.shape[-1])[:, self._places], last


def _read_manifest(source: Path) -> dict[str, Any]:
    path = source / MANIFEST
    if "draft_vocab_size" in read_manifest(path, {}):
        raise InputError(
            f"{path}: expected the cache of Automodel's DSpark trainer (precompute_dspark), found the one of its "
            "Eagle3 trainer: renormalised probabilities over its own draft vocabulary and no last state, so that "
            "neither log Z over the verifier's vocabulary nor the tail can be known: capture its conversations with "
            "`draftcache capture`"
        )
    manifest = read_manifest(path, _FIELDS)
    if manifest["format_version"] != VERSION or manifest["shard_size"] < 1:
        raise InputError(
            f"{path}: expected format_version {VERSION} and a shard_size of at least 1, found "
            f"{manifest['format_version']} and {manifest['shard_size']}"
        )
    block_numbers(path, manifest["target_layer_ids"])
    return manifest


def _require_shapes(path: Path, file: Any, manifest: dict[str, Any]) -> tuple[int, torch.dtype]:
    """The number of conversations and the dtype of states, once all arrays fit. Raises DamagedSampleError."""
    names, width = set(file.keys()), manifest["hidden_size"]
    needed = {"input_ids": (), "loss_mask": (), _STATES: (len(manifest["target_layer_ids"]) * width,), _LAST: (width,)}
    if not needed.keys() <= names:
        raise DamagedSampleError(f"{path}: expected {sorted(needed)}, found {sorted(names)}")
    checked = [name for name in (*needed, "attention_mask") if name in names]
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in checked}
    rows = shapes["input_ids"][:2]
    if len(rows) < 2 or not rows[1]:
        raise DamagedSampleError(f"{path}: expected input_ids [n, S] of n rows, found {list(rows)}")
    if expected := {
        name: (*rows, *needed.get(name, ())) for name in checked if shapes[name] != (*rows, *needed.get(name, ()))
    }:
        raise DamagedSampleError(f"{path}: expected {expected}, found { {name: shapes[name] for name in expected} }")
    kinds = {file.get_slice(name).get_dtype() for name in (_STATES, _LAST)}
    if len(kinds) != 1 or not kinds <= DTYPES.keys():
        raise DamagedSampleError(f"{path}: expected states of one dtype of {sorted(DTYPES)}, found {sorted(kinds)}")
    return rows[0], DTYPES[kinds.pop()]


def _length(path: Path, token_ids: NDArray[Any], loss: NDArray[np.bool_], attention: NDArray[Any] | None) -> int:
    """Tokens of a row without its padding.

    Without an attention mask, equal tokens without loss at the end of a row are taken for padding. If one of them was a
    real token, nothing that is learned is lost: none of them is predicted, and none is read before another that is.
    Raises DamagedSampleError for padding at the start, behind which positions are unknown.
    """
    if attention is not None:
        length = int(attention.sum())
        if not (attention[:length] == 1).all():
            raise DamagedSampleError(
                f"{path}: expected padding behind the tokens only, found an attention mask of others"
            )
        return length
    run = (token_ids == token_ids[0]) & ~loss
    if len(run) >= _LEADING_PADS and run[:_LEADING_PADS].all():
        raise DamagedSampleError(
            f"{path}: expected padding behind the tokens only, found a row that begins with token {token_ids[0]} "
            f"{_LEADING_PADS} times"
        )
    other = np.flatnonzero((token_ids != token_ids[-1]) | loss)
    return int(other[-1]) + 1 if len(other) else 0
