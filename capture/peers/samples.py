"""One conversation of another project's cache: its token ids at once, its states when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draftcache.store.common.errors import DraftcacheError, InputError
from draftcache.store.common.files import read_json

STATE_DTYPES = (torch.bfloat16, torch.float32, torch.float16)


LoadStates: TypeAlias = Callable[[], tuple[Tensor, Tensor]]


class DamagedSampleError(DraftcacheError):
    """A file holds no whole conversation of the form that it should have: it is set aside, and the import goes on."""


@dataclass(frozen=True, kw_only=True)
class PeerSample:
    """What a file says of one conversation of L tokens, before its states are read."""

    path: Path
    """The file; of a file that holds many conversations, with `#N` behind its name for conversation N."""
    token_ids: NDArray[np.int64]
    """[L], those that have a state."""
    loss_mask: NDArray[np.bool_] | None
    """[L], or None where the form has none, or the file lacks it."""
    dtype: torch.dtype
    """Of the states, as `load` gives them."""
    taps: int
    """Number of auxiliary states per token."""
    hidden_size: int
    before_norm: bool | None
    """Whether the file itself says that its last state is from before the final norm; None where it says nothing."""
    load: LoadStates
    """Reads the states: auxiliary ones [L, taps, H] in the file's order, and the last one [L, H]."""


@dataclass(frozen=True)
class SetAside:
    """A file, or a conversation of it, that is not imported."""

    file: str
    reason: str

    @classmethod
    def of(cls, path: Path, damage: DamagedSampleError) -> SetAside:
        """What is set aside for a damage, whose text does not repeat the path."""
        return cls(str(path), str(damage).removeprefix(f"{path}: "))


@dataclass(frozen=True, kw_only=True)
class CacheDescription:
    """What a cache says of itself, beside its conversations. Most say nothing."""

    verifier: str = ""
    """The name or path by which it knows its verifier."""
    layers: tuple[int, ...] = ()
    """Blocks whose outputs its auxiliary states are, in the order in which `PeerSample.load` gives them."""
    left_out: tuple[str, ...] = ()
    """Auxiliary states that it holds and that no store can hold."""
    weights: Path | None = None
    """A file with its verifier's embeddings and head."""


@dataclass(frozen=True, kw_only=True)
class PeerCache:
    """A cache whose own description, where it has one, has been read."""

    files: Sequence[Path]
    """In order; one that is missing is damage when it is read."""
    read: Callable[[Path], Iterator[PeerSample | SetAside]]
    """The conversations of a file, and what of them is damaged. Raises DamagedSampleError if the whole file is."""
    description: CacheDescription = CacheDescription()


class PeerReader(Protocol):
    """The reader of one project's files."""

    @property
    def name(self) -> str:
        """The project's name, as --from has it."""

    @property
    def last_state(self) -> str:
        """Where that project's own trainer takes the last state from: "before" or "after" the final norm.

        It is stated beside what the probe finds, and decides nothing.
        """

    def open(self, source: Path) -> PeerCache:
        """The cache in a folder. Raises InputError where there is none, or its own description can't be read."""


def require_sample(sample: PeerSample, states: tuple[int, ...]) -> PeerSample:
    """The sample, once its parts fit together; `states` is the shape that its auxiliary states have in the file.

    Raises DamagedSampleError.
    """
    length, path = len(sample.token_ids), sample.path
    if not length:
        raise DamagedSampleError(f"{path}: expected at least one token, found none")
    if sample.token_ids.min() < 0:
        raise DamagedSampleError(f"{path}: expected token ids >= 0, found {sample.token_ids.min()}")
    if states[0] != length:
        raise DamagedSampleError(f"{path}: expected states of {length} tokens, as many as token ids, found {states[0]}")
    if sample.loss_mask is not None and len(sample.loss_mask) != length:
        raise DamagedSampleError(
            f"{path}: expected a loss mask of {length} tokens, found one of {len(sample.loss_mask)}"
        )
    if sample.dtype not in STATE_DTYPES:
        raise DamagedSampleError(f"{path}: expected states in {STATE_DTYPES}, found {sample.dtype}")
    return sample


def mask_of(path: Path, values: Tensor) -> NDArray[np.bool_]:
    """A stored loss mask [L] or [1, L] of zeros and ones. Raises DamagedSampleError for other values."""
    flat: NDArray[np.generic] = values.reshape(-1).float().numpy()
    if not np.isin(flat, (0, 1)).all():
        raise DamagedSampleError(
            f"{path}: expected a loss mask of zeros and ones, found {np.unique(flat)[:5].tolist()}"
        )
    return flat.astype(np.bool_)


def natural_order(path: Path) -> tuple[int, str]:
    """Sorts hs_10 behind hs_9: by the length of the name, then the name."""
    return len(path.name), str(path)


def read_manifest(path: Path, kinds: Mapping[str, type]) -> dict[str, Any]:
    """A cache's own JSON description, which has values of these kinds under these names. Raises InputError."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(values).__name__}")
    for name, kind in kinds.items():
        if not isinstance(values.get(name), kind):
            raise InputError(f"{path}: expected {name}, of type {kind.__name__}, found {values.get(name)!r}")
    return values


def block_numbers(path: Path, values: list[Any]) -> list[int]:
    """A description's list of layer ids, of which -1 is the embeddings. Raises InputError for anything else."""
    if not values or not all(isinstance(value, int) and value >= -1 for value in values):
        raise InputError(f"{path}: expected target_layer_ids, blocks from 0 or -1 for embeddings, found {values}")
    if values != sorted(set(values)):
        raise InputError(f"{path}: expected target_layer_ids in ascending order, each once, found {values}")
    return values
