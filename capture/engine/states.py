"""A verifier that a running engine computes, in the place of one that is loaded here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draftcache.capture.engine.client import StatesClient
from draftcache.capture.peers.recorded import RecordedVerifier, tokens_key
from draftcache.capture.peers.samples import PeerSample
from draftcache.capture.peers.verifier_parts import VerifierParts
from draftcache.capture.verifier.forward import Piece
from draftcache.store.common.errors import GateError, InputError


class EngineVerifier(RecordedVerifier):
    """States that the engine extracts. Implements `verifier.source.StateSource` and `verifier.source.ReadsAhead`."""

    def __init__(
        self,
        client: StatesClient,
        parts: VerifierParts,
        layers: tuple[int, ...],
        first: PeerSample,
        *,
        last_state: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`layers` are the blocks of the auxiliary states; `first` stands for all conversations, which are alike."""
        super().__init__(
            parts, self._kept_states, layers, last_state=last_state, dtype=dtype, device=device, name=client.name,
            origin=f"{client.name} {client.version}",
        )  # fmt: skip
        self._client = client
        self._like = _form(first)
        self._outcomes: dict[str, PeerSample | GateError] = {}
        """What was read of conversations that no piece was made of yet, by `tokens_key`."""

    def read_ahead(self, conversations: Sequence[NDArray[np.int64]]) -> None:
        self._client.read_ahead(conversations)

    def states(
        self, token_ids: Tensor, lengths: Sequence[int], layers: tuple[int, ...], chunk_tokens: int
    ) -> Iterator[Piece]:
        """All states of these conversations in one piece, padded with zeros.

        Raises GateError where those of one can't be had. Those of the others are kept for the calls that ask for them
        one by one.
        """
        rows = [ids[:length].numpy() for ids, length in zip(token_ids.cpu(), lengths, strict=True)]
        keys = [tokens_key(row) for row in rows]
        for key, row in zip(keys, rows, strict=True):
            if key not in self._outcomes:
                self._outcomes[key] = self._outcome(row)
        failed = [found for key in keys if isinstance(found := self._outcomes[key], GateError)]
        if failed:
            if len(rows) == 1:
                del self._outcomes[keys[0]]
            raise failed[0]
        yield from super().states(token_ids, lengths, layers, chunk_tokens)
        for key in keys:
            self._outcomes.pop(key, None)

    def _outcome(self, token_ids: NDArray[np.int64]) -> PeerSample | GateError:
        try:
            sample = self._client.states_of(token_ids).sample
        except GateError as exc:
            return exc
        if (found := _form(sample)) != self._like:
            raise InputError(
                f"{self._client.url}: expected {self._like} as at the start of this job, found {found}: the server was "
                f"started with other settings since. Start it with: {self._client.serve}"
            )
        return sample

    def _kept_states(self, token_ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        kept = self._outcomes[tokens_key(token_ids)]
        assert isinstance(kept, PeerSample)
        return kept.load()


def _form(sample: PeerSample) -> dict[str, Any]:
    """What the states of all conversations of one server have in common."""
    return {"states per token": sample.taps + 1, "channels": sample.hidden_size, "dtype": str(sample.dtype)}
