"""A verifier whose states were computed and stored by another project, in the place of one that runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from draftcache.capture.peers.samples import DamagedSampleError, LoadStates
from draftcache.capture.peers.verifier_parts import VerifierParts
from draftcache.capture.verifier.forward import Piece
from draftcache.capture.verifier.identity import describe_parts
from draftcache.capture.verifier.norm import FinalNorm
from draftcache.store.common.errors import GateError
from draftcache.store.common.files import hash_bytes
from draftcache.store.format.head_form import HeadForm

BEFORE, AFTER = "before", "after"
StatesOf: TypeAlias = Callable[[NDArray[np.int64]], tuple[Tensor, Tensor]]
"""Auxiliary states [L, taps, H] and the last state [L, H] of token ids [L]. Raises GateError where there are none."""


def tokens_key(token_ids: NDArray[Any]) -> str:
    """Which conversation these token ids [L] are: states of a causal model depend on nothing else."""
    return hash_bytes(np.ascontiguousarray(token_ids, "<u4").tobytes())


def states_of_files(loads: Mapping[str, LoadStates]) -> StatesOf:
    """How to read the states of token ids, of which `loads` has the files by `tokens_key`."""

    def states_of(token_ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        load = loads.get(tokens_key(token_ids))
        if load is None:
            raise GateError("expected the states of these token ids in a file of the source, found none")
        try:
            return load()
        except DamagedSampleError as exc:
            raise GateError(str(exc)) from exc

    return states_of


class RecordedVerifier:
    """States by the token ids that they were computed from. Implements `verifier.source.StateSource`."""

    chunk_multiple = 1

    def __init__(
        self,
        parts: VerifierParts,
        states_of: StatesOf,
        layers: tuple[int, ...],
        *,
        last_state: str,
        dtype: torch.dtype,
        device: torch.device,
        origin: str,
        name: str = "recorded",
    ) -> None:
        """`layers` are the blocks of the auxiliary states, in their order; `origin` says where the states are from.

        `last_state` says whether the last state is from before or after the final norm; before it, it is the last
        block's output too, which may then be asked for.
        """
        self.name = name
        self._parts, self._states_of, self._layers = parts, states_of, layers
        self._last_state, self._dtype, self._origin = last_state, dtype, origin
        self._final_norm = copy.deepcopy(parts.final_norm).to(device, dtype)
        self._head = copy.deepcopy(parts.head).to(device)
        self.device = device

    @property
    def hidden_size(self) -> int:
        return int(self._parts.embeddings.embedding_dim)

    @property
    def vocab_size(self) -> int:
        return int(self._parts.head.out_features)

    @property
    def embeddings(self) -> nn.Embedding:
        return self._parts.embeddings

    @property
    def head(self) -> nn.Linear:
        return self._head

    @property
    def head_form(self) -> HeadForm:
        return self._parts.head_form

    @property
    def norm(self) -> FinalNorm:
        return self._parts.norm

    def implementations(self) -> dict[str, str]:
        return {"states": self._origin, "last state": f"{self._last_state} the final norm"}

    def describe(self, path: Path, *, full_hash: bool) -> dict[str, Any]:
        parts = self._parts
        return describe_parts(
            path, parts.config, architecture=parts.architecture, layers=parts.layers, hidden_size=self.hidden_size,
            head=parts.head, norm=parts.norm, head_form=parts.head_form, full_hash=full_hash,
        )  # fmt: skip

    def states(
        self, token_ids: Tensor, lengths: Sequence[int], layers: tuple[int, ...], chunk_tokens: int
    ) -> Iterator[Piece]:
        """All states of these conversations in one piece, padded with zeros.

        Raises GateError where the states of a conversation can't be had.
        """
        rows = [self._read(ids[:length].numpy(), layers) for ids, length in zip(token_ids.cpu(), lengths, strict=True)]
        width = token_ids.shape[1]
        yield Piece(
            first=0,
            taps={layer: torch.stack([_padded(taps[layer], width) for taps, _ in rows]) for layer in layers},
            final=torch.stack([_padded(final, width) for _, final in rows]),
        )

    @torch.inference_mode()
    def _read(self, token_ids: NDArray[np.int64], layers: tuple[int, ...]) -> tuple[dict[int, Tensor], Tensor]:
        """Taps [L, H] by block and the final norm's output [L, H] of one conversation."""
        aux, last = self._states_of(token_ids)
        length = len(token_ids)
        aux, last = (states[:length].to(self.device, self._dtype) for states in (aux, last))
        taps = {layer: aux[:, place] for place, layer in enumerate(self._layers)}
        if self._last_state == AFTER:
            return {layer: taps[layer] for layer in layers}, last
        taps.setdefault(self._parts.layers - 1, last)
        return {layer: taps[layer] for layer in layers}, self._final_norm(last[None])[0]


def _padded(states: Tensor, length: int) -> Tensor:
    missing = length - states.shape[0]
    return states if not missing else torch.cat([states, states.new_zeros(missing, states.shape[1])])
