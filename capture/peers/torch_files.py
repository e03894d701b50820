"""Files of torch.save, one dict of tensors per conversation: SpecForge's `.ckpt` and ModelOpt's `.pt`.

torch.save writes pickle. These files are only ever read with `weights_only=True`: torch's restricted unpickler builds
tensors, dicts and numbers and runs no code of the file; whatever else a file holds is refused, and the file set aside.

By the source of SpecForge 0.2 (algorithms/eagle3/data.py, runtime/data_plane/offline_reader.py, modeling/target):
`input_ids` [L], `loss_mask` [L], `aux_hidden_state` [1, L, N * H], `hidden_state` [1, L, H], which its target head
reads as it is: behind the final norm. `.ckpt.gz` is the same, compressed.

By the source of ModelOpt 0.47 (torch/speculative/eagle/utils.py): `input_ids` [L], `hidden_states` [L, H],
`aux_hidden_states` [L, N * H], `loss_mask` [L] if the dump was made with --answer-only-loss, and
`hidden_states_prenorm`, True where the state is from before the final norm.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from draftcache.capture.peers.samples import (
    DamagedSampleError,
    PeerCache,
    PeerSample,
    mask_of,
    natural_order,
    require_sample,
)
from draftcache.store.common.errors import InputError


@dataclass(frozen=True)
class TorchReader:
    """Reads dicts of tensors with these keys. Implements `PeerReader`."""

    name: str
    suffixes: tuple[str, ...]
    aux: str
    last: str
    last_state: str
    before_norm: str | None = None
    """The key that says whether the last state is from before the final norm."""

    def open(self, source: Path) -> PeerCache:
        """All files below the folder whose names end so. Raises InputError where there is none."""
        found = [path for path in source.rglob("*") if path.name.endswith(self.suffixes) and path.is_file()]
        if not found:
            raise InputError(f"{source}: expected a folder with files {' or '.join(self.suffixes)}, found none")
        return PeerCache(files=sorted(found, key=natural_order), read=self.read)

    def read(self, path: Path) -> Iterator[PeerSample]:
        """The one conversation of a file. Raises DamagedSampleError."""
        raw = load_tensors(path)
        missing = [name for name in ("input_ids", self.aux, self.last) if not isinstance(raw.get(name), Tensor)]
        if missing:
            raise DamagedSampleError(f"{path}: expected tensors {missing}, found {sorted(map(str, raw))}")
        aux, last, mask = raw[self.aux], raw[self.last], raw.get("loss_mask")
        length, width = aux.shape[-2] if aux.ndim > 1 else 0, last.shape[-1]
        taps = aux.shape[-1] // max(width, 1)
        if aux.numel() != length * taps * width or last.numel() != length * width or aux.dtype != last.dtype:
            raise DamagedSampleError(
                f"{path}: expected {self.aux} [L, N * H], of N layers, and {self.last} [L, H] of one dtype, "
                f"found {list(aux.shape)} {aux.dtype} and {list(last.shape)} {last.dtype}"
            )
        yield require_sample(
            PeerSample(
                path=path,
                token_ids=raw["input_ids"].reshape(-1).numpy().astype(np.int64),
                loss_mask=mask_of(path, mask) if isinstance(mask, Tensor) else None,
                dtype=aux.dtype,
                taps=taps,
                hidden_size=width,
                before_norm=self._says_before_norm(raw),
                load=lambda: self._states(path, length, taps, width),
            ),
            (length,),
        )

    def _says_before_norm(self, raw: dict[str, Any]) -> bool | None:
        value = None if self.before_norm is None else raw.get(self.before_norm)
        return None if value is None else bool(value)

    def _states(self, path: Path, length: int, taps: int, width: int) -> tuple[Tensor, Tensor]:
        raw = load_tensors(path)
        try:
            return raw[self.aux].reshape(length, taps, width), raw[self.last].reshape(length, width)
        except (KeyError, RuntimeError, AttributeError) as exc:
            raise DamagedSampleError(f"{path}: expected the file as it was when the import began ({exc})") from exc


SPECFORGE = TorchReader("specforge", (".ckpt", ".ckpt.gz"), "aux_hidden_state", "hidden_state", "after")
MODELOPT = TorchReader("modelopt", (".pt",), "aux_hidden_states", "hidden_states", "after", "hidden_states_prenorm")


def load_tensors(path: Path) -> dict[str, Any]:
    """A file of torch.save, tensors and plain values only, its states mapped. Raises DamagedSampleError."""
    try:
        if path.name.endswith(".gz"):
            with gzip.open(path, "rb") as file:
                raw = torch.load(io.BytesIO(file.read()), map_location="cpu", weights_only=True)
        else:
            raw = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError, zlib.error) as exc:
        reason = str(exc).splitlines()[0][:200] if str(exc) else type(exc).__name__
        raise DamagedSampleError(f"{path}: expected a whole file of torch.save, found another ({reason})") from exc
    if not isinstance(raw, dict):
        raise DamagedSampleError(f"{path}: expected a dict of tensors, found {type(raw).__name__}")
    return raw
