"""The interface of a forward that capture runs, and the plain one: the model's own code, read through hooks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache


@dataclass(frozen=True)
class Piece:
    """Rows `first .. first + l` of every sequence of a batch; taps by block number and the final norm, [B, l, H]."""

    first: int
    taps: dict[int, Tensor]
    final: Tensor

    def rows_of(self, positions: NDArray[Any]) -> NDArray[np.int64]:
        """Which of the piece's rows those of the ascending positions are that lie in it."""
        low, high = np.searchsorted(positions, (self.first, self.first + self.final.shape[1]))
        return positions[low:high].astype(np.int64) - self.first


class Forward(Protocol):
    """Runs the verifier's body over token ids, without gradients."""

    name: str
    """ "draftcache", or "transformers" for the model's own code."""

    def implementations(self) -> dict[str, str]:
        """What runs, for the log and the store's provenance: "attention", "experts", and "reason" for a fallback."""

    def prefill(self, token_ids: Tensor, layers: tuple[int, ...], chunk_tokens: int) -> Iterator[Piece]:
        """Pieces of at most `chunk_tokens` rows of `token_ids` [B, L] int64, which may be padded on the right.

        State is carried from piece to piece in float32. A piece's tensors are the caller's.
        """


class PlainForward:
    """Any causal LM, by its own code. Pieces after the first go through the model's own cache."""

    name = "transformers"

    def __init__(self, body: Any, blocks: nn.ModuleList, final_norm: nn.Module, reason: str = "") -> None:
        """`reason` says why no faster forward was taken."""
        self._body, self._blocks, self._final_norm = body, blocks, final_norm
        self._reason = reason
        # transformers 5.24 renames it, and warns of the old name.
        self._cache = "cache" if "cache" in inspect.signature(body.forward).parameters else "past_key_values"

    def implementations(self) -> dict[str, str]:
        """See Forward."""
        names = {"attention": "_attn_implementation", "experts": "_experts_implementation"}
        found = {name: getattr(self._body.config, attribute, None) for name, attribute in names.items()}
        return {name: str(value) for name, value in (found | {"reason": self._reason}).items() if value}

    @torch.inference_mode()
    def prefill(self, token_ids: Tensor, layers: tuple[int, ...], chunk_tokens: int) -> Iterator[Piece]:
        """See Forward."""
        length = token_ids.shape[1]
        cache = DynamicCache(config=self._body.config) if length > chunk_tokens else None
        for first in range(0, length, chunk_tokens):
            yield self._piece(token_ids[:, first : first + chunk_tokens], layers, first, cache)

    def _piece(self, token_ids: Tensor, layers: tuple[int, ...], first: int, cache: Any) -> Piece:
        taps: dict[int, Tensor] = {}
        final: list[Tensor] = []

        def keep(layer: int) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                taps[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [self._blocks[layer].register_forward_hook(keep(layer)) for layer in layers]
        handles.append(self._final_norm.register_forward_hook(lambda _m, _i, output: final.append(output)))
        try:
            carried = {} if cache is None else {self._cache: cache}
            self._body(input_ids=token_ids, use_cache=cache is not None, **carried)
        finally:
            for handle in handles:
                handle.remove()
        return Piece(first=first, taps=taps, final=final[-1])
