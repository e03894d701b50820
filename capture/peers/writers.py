"""A store as another project's cache: the files that its own trainer reads.

Both projects keep states of every token of a conversation, and a last state. A store keeps rows up to the last one
at which a draft starts, so a conversation is written up to that row: its last tokens, usually two, are left out, and
counted. Nothing is made up: the last state is the last block's stored output, for SpecForge with the final norm
applied.

What is written for each split, in a folder of its name:

- speculators: `hidden_states/hs_N.safetensors` and a dataset for `datasets.load_from_disk` with input_ids, loss_mask
  and seq_len, all in the forms that `safetensors_files` describes.
- SpecForge: `N.ckpt` by torch.save, in the form that `torch_files` describes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from draftcache.capture.verifier.norm import RMS_NORM
from draftcache.store.common.errors import InputError
from draftcache.store.common.files import atomic_path, hash_json, read_json
from draftcache.store.common.tensor_files import save_tensors
from draftcache.store.format.array_spec import tap_name
from draftcache.store.format.frozen import NORM
from draftcache.store.reader import StoreReader

TARGETS = ("speculators", "specforge")
DESCRIPTION = "draftcache.json"
"""Beside the splits: what the files hold, which the files themselves can't say."""


@dataclass
class CacheSummary:
    """What was written now and before."""

    conversations: int = 0
    tokens: int = 0
    tokens_left_out: int = 0
    learned_tokens_left_out: int = 0
    files_written: int = 0


class CacheWriter:
    """Writes a store as another project's cache, file by file; the same call again goes on."""

    def __init__(self, store: StoreReader, target: Path, peer: str) -> None:
        """Raises InputError for a store that lacks rows or states which that project needs, and another's target."""
        if peer not in TARGETS:
            raise InputError(f"--to: expected one of {list(TARGETS)}, found {peer!r}")
        self._store, self._target, self._peer = store, target, peer
        self._layers = store.manifest.layers
        _require_states(store, peer)
        self.summary = CacheSummary()
        self._norm = _final_norm(store)

    @property
    def tokens(self) -> int:
        """Tokens of all conversations."""
        return int(self._store.index["tokens"].sum())

    @property
    def lossy(self) -> bool:
        """Whether the stored taps are rounded."""
        return self._store.manifest.mode in ("int8", "fp8")

    def run(self, progress: Callable[[int], object] = lambda tokens: None) -> CacheSummary:
        """Write what is not there yet, calling `progress` with the tokens of each conversation."""
        self._describe()
        for split in self._store.manifest.splits:
            folder = self._target / split
            for number, item in enumerate(self._store.members(split).tolist()):
                progress(self._conversation(item, folder, number))
            if self._peer == "speculators":
                save_dataset(folder, self._rows(split))
        return self.summary

    def _describe(self) -> None:
        """Write the description, or compare it. Raises InputError where the target holds something else."""
        manifest, path = self._store.manifest, self._target / DESCRIPTION
        described = {
            "to": self._peer,
            "store": manifest.hash,
            "verifier": manifest.verifier,
            "tokenizer_hash": manifest.tokenizer_hash,
            "taps_mode": manifest.mode,
            "auxiliary_blocks": list(self._layers[:-1]),
            "auxiliary_layer_ids": [layer + 1 for layer in self._layers[:-1]],
            "last_state": "before the final norm" if self._peer == "speculators" else "after the final norm",
        }
        if path.is_file():
            if read_json(path) != described:
                raise InputError(f"{path}: expected the description of this store, found another's: use another folder")
            return
        if self._target.is_dir() and any(self._target.iterdir()):
            raise InputError(
                f"{self._target}: expected an empty folder or one that was begun before, found other files"
            )
        self._target.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial:
            partial.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")

    def _conversation(self, item: int, folder: Path, number: int) -> int:
        """Write one conversation unless its file is there, and count it; returns the number of its tokens."""
        heads = self._store.read(item, ["token_ids", "loss_mask", "positions"]).arrays
        rows = len(heads["positions"])
        ids, mask = heads["token_ids"][:rows].astype(np.int64), heads["loss_mask"][:rows].astype(np.int64)
        self.summary.conversations += 1
        self.summary.tokens += rows
        self.summary.tokens_left_out += len(heads["token_ids"]) - rows
        self.summary.learned_tokens_left_out += int(heads["loss_mask"][rows:].sum())
        name = f"hidden_states/hs_{number}.safetensors" if self._peer == "speculators" else f"{number:08d}.ckpt"
        path = folder / name
        if not path.is_file():
            states = self._states(item)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as partial:
                self._save(partial, torch.from_numpy(ids), torch.from_numpy(mask), states)
            self.summary.files_written += 1
        return rows

    def _states(self, item: int) -> Tensor:
        """All taps [L, N + 1, H] of a conversation in the states' dtype."""
        arrays = self._store.read(item, [tap_name(layer) for layer in self._layers]).arrays
        return torch.stack([_tensor(arrays[tap_name(layer)]) for layer in self._layers], 1)

    def _save(self, path: Path, ids: Tensor, mask: Tensor, states: Tensor) -> None:
        if self._peer == "speculators":
            save_tensors(path, {"hidden_states": states.contiguous(), "token_ids": ids})
            return
        sample = {
            "input_ids": ids,
            "loss_mask": mask,
            "hidden_state": self._norm(states[:, -1])[None],
            "aux_hidden_state": states[:, :-1].flatten(1)[None],
        }
        torch.save(sample, path)

    def _rows(self, split: str) -> Iterator[tuple[list[int], list[int]]]:
        for item in self._store.members(split).tolist():
            heads = self._store.read(item, ["token_ids", "loss_mask", "positions"]).arrays
            rows = len(heads["positions"])
            yield heads["token_ids"][:rows].tolist(), heads["loss_mask"][:rows].tolist()


def _require_states(store: StoreReader, peer: str) -> None:
    manifest = store.manifest
    last, layers = manifest.verifier["layers"] - 1, manifest.layers
    again = f"capture again with --layers {','.join(map(str, sorted({*layers, last})))} --window 0"
    if manifest.window is not None:
        raise InputError(
            f"{store.location}: expected the taps of all rows, which {peer} reads, found a store pruned by --window "
            f"{manifest.window}: {again}"
        )
    if layers[-1] != last or len(layers) < 2:
        raise InputError(
            f"{store.location}: expected the last block {last} among the taps, from which {peer}'s last state is made, "
            f"and others before it, found {list(layers)}: {again}"
        )
    if peer == "specforge" and manifest.verifier.get("final_norm", RMS_NORM) != RMS_NORM:
        raise InputError(
            f"{store.location}: expected an RMS norm behind the last block, found another: use speculators"
        )


def _final_norm(store: StoreReader) -> Callable[[Tensor], Tensor]:
    """The verifier's final norm over [L, H], in the order of operations of transformers' own RMS norms."""
    weight, eps = load_file(store.files.frozen)[NORM], float(store.manifest.verifier["rms_norm_eps"])

    def normed(states: Tensor) -> Tensor:
        wide = states.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        if weight.dtype == states.dtype:
            return weight * wide.to(states.dtype)
        return (weight.float() * wide).to(states.dtype)  # 1 + w, kept in float32

    return normed


def _tensor(states: NDArray[Any]) -> Tensor:
    """States as a tensor; bit patterns (uint16) are bfloat16."""
    tensor = torch.from_numpy(np.ascontiguousarray(states))
    return tensor.view(torch.bfloat16) if states.dtype == np.uint16 else tensor


def save_dataset(folder: Path, rows: Iterator[tuple[list[int], list[int]]]) -> None:
    """Write rows of (ids, mask) for `datasets.load_from_disk`, which gives torch's tensors.

    Raises InputError without pyarrow.
    """
    try:
        import pyarrow as pa
    except ImportError as exc:
        raise InputError(
            f"{folder}: expected pyarrow, to write the dataset that speculators reads, found none: "
            "pip install 'draftcache[arrow]'"
        ) from exc
    lists = {"feature": {"dtype": "int64", "_type": "Value"}, "_type": "List"}
    info = {"features": {"input_ids": lists, "loss_mask": lists, "seq_len": {"dtype": "int64", "_type": "Value"}}}
    schema = pa.schema(
        [("input_ids", pa.list_(pa.int64())), ("loss_mask", pa.list_(pa.int64())), ("seq_len", pa.int64())],
        metadata={"huggingface": json.dumps({"info": info})},
    )
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "data-00000-of-00001.arrow") as partial, pa.ipc.new_stream(str(partial), schema) as file:
        for ids, mask in rows:
            row = {"input_ids": [ids], "loss_mask": [mask], "seq_len": [len(ids)]}
            file.write_batch(pa.RecordBatch.from_pydict(row, schema=schema))
    state: dict[str, Any] = {
        "_data_files": [{"filename": "data-00000-of-00001.arrow"}],
        "_fingerprint": hash_json([info, str(folder)])[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": "torch",
        "_output_all_columns": False,
        "_split": None,
    }
    for name, value in (("dataset_info.json", info), ("state.json", state)):
        with atomic_path(folder / name) as partial:
            partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
