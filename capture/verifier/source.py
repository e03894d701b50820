"""What capture needs of a verifier, whether it runs here or its states were computed elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from draftcache.capture.verifier.forward import Piece
from draftcache.capture.verifier.norm import FinalNorm
from draftcache.store.format.head_form import HeadForm


class StateSource(Protocol):
    """States by token ids, the weights that training and the teacher need, and the verifier's identity.

    `load.Verifier` computes the states; `draftcache.capture.peers` reads those that another project stored. Everything
    behind the states (which rows are kept, teacher, gates, codec, shards) is the same for both.
    """

    @property
    def name(self) -> str:
        """What makes the states, for the store's provenance."""

    @property
    def device(self) -> torch.device:
        """Where the states and the head are."""

    @property
    def chunk_multiple(self) -> int:
        """A piece's length must be a multiple of this number of tokens."""

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""

    @property
    def embeddings(self) -> nn.Embedding:
        """[V, H], of the blocks' width."""

    @property
    def head(self) -> nn.Linear:
        """What makes logits of the final norm's output, before `head_form`."""

    @property
    def head_form(self) -> HeadForm:
        """Scale and cap of the logits."""

    @property
    def norm(self) -> FinalNorm:
        """What the final norm computes."""

    def implementations(self) -> dict[str, str]:
        """What makes the states in detail, for the log and the store's provenance."""

    def describe(self, path: Path, *, full_hash: bool) -> dict[str, Any]:
        """The verifier's identity for the manifest, from its directory."""

    def states(
        self, token_ids: Tensor, lengths: Sequence[int], layers: tuple[int, ...], chunk_tokens: int
    ) -> Iterator[Piece]:
        """Pieces of at most `chunk_tokens` rows of `token_ids` [B, L] int64, which are padded on the right.

        Row b holds `lengths[b]` tokens; states of padding are never read. Raises GateError, before the first piece,
        where the states of one of the conversations can't be had: it is quarantined, and the job goes on.
        """


@runtime_checkable
class ReadsAhead(Protocol):
    """A `StateSource` that gains from knowing what it will be asked for, such as a server that takes many requests."""

    def read_ahead(self, conversations: Sequence[NDArray[np.int64]]) -> None:
        """Take the token ids [L] of the conversations that `states` will be asked for next, in their order."""
