"""What capture asks of a verifier's forward, and the plain forward: the model's own code, read through hooks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import DynamicCache

from draftcache.capture.verifier.flops import Flops, gated_flops
from draftcache.capture.verifier.ssm_precision import mamba_mixers


@dataclass(frozen=True)
class Piece:
    """States at the positions `first .. first + l` of every sequence of a batch.

    Taps by block number and the final norm's output, each [B, l, H] in the model's dtype.
    """

    first: int
    taps: dict[int, Tensor]
    final: Tensor

    def rows_of(self, positions: NDArray[Any]) -> NDArray[np.int64]:
        """Rows of this piece that hold the given ascending positions; positions outside of it are left out."""
        low, high = np.searchsorted(positions, (self.first, self.first + self.final.shape[1]))
        return positions[low:high].astype(np.int64) - self.first


def block_state(output: Any) -> Any:
    """The residual stream of what a block returned, which may come first among other things."""
    return output[0] if isinstance(output, tuple | list) and output else output


class Forward(Protocol):
    """Runs a loaded verifier's body over token ids, without gradients."""

    name: str
    """ "draftcache", or "transformers" for the model's own code."""

    @property
    def chunk_multiple(self) -> int:
        """A piece's length must be a multiple of this: the chunk of the model's scan in tokens, 1 without a scan."""

    def implementations(self) -> dict[str, str]:
        """What runs, for the log and the store's provenance: "attention", "experts", and "reason" for a fallback."""

    def prefill(self, token_ids: Tensor, layers: tuple[int, ...], chunk_tokens: int) -> Iterator[Piece]:
        """Pieces of at most `chunk_tokens` rows of `token_ids` [B, L] int64, which may be padded on the right.

        State is carried from piece to piece in float32. The caller owns the tensors of a piece.
        """

    def block_differences(self, token_ids: Tensor) -> list[float]:
        """Per block |ours - theirs| / |theirs| of what it adds to the residual stream; theirs is the model's own code.

        `token_ids` [B, L] int64. The list is empty where this forward is the model's own code.
        """


class FamilyForward(Forward, Protocol):
    """The forward of a family of models, with all that capture knows of the family; `families.FORWARDS` lists them."""

    @staticmethod
    def supports(model: Any) -> str | None:
        """The reason why this forward can't run the model, or None where it can."""

    @classmethod
    def of(cls, model: Any, body: Any, blocks: nn.ModuleList, final_norm: nn.Module, reason: str) -> Self:
        """The forward of a model that it supports; `reason` says why no more specific forward was taken."""

    @staticmethod
    def flops(config: Mapping[str, Any]) -> Flops | None:
        """FLOPs by the family's config.json; None for a config of another family."""


class PlainForward:
    """Runs any causal LM by its own code; pieces after the first go through the model's own cache.

    Implements `FamilyForward`.
    """

    name = "transformers"

    def __init__(
        self, body: Any, blocks: nn.ModuleList, final_norm: nn.Module, reason: str = "", *, model: Any = None
    ) -> None:
        """`reason` says why no faster forward was taken. A `model` whose norm is not in `body` runs up to its head."""
        self._body, self._blocks, self._final_norm = body, blocks, final_norm
        self._model = model
        self._reason = reason
        # transformers 5.24 renames the argument, and warns of the old name.
        self._cache = "cache" if "cache" in inspect.signature(body.forward).parameters else "past_key_values"

    @staticmethod
    def supports(model: Any) -> str | None:
        """None: the model's own code runs it."""
        return None

    @classmethod
    def of(cls, model: Any, body: Any, blocks: nn.ModuleList, final_norm: nn.Module, reason: str) -> Self:
        inside = any(module is final_norm for module in body.modules())
        return cls(body, blocks, final_norm, reason, model=None if inside else model)

    @staticmethod
    def flops(config: Mapping[str, Any]) -> Flops | None:
        """FLOPs of stacks of attention and gated MLPs; None for other models, which this forward runs too."""
        return gated_flops(config)

    @property
    def chunk_multiple(self) -> int:
        """The chunk of the first Mamba block's scan; 1 for a model without Mamba blocks."""
        return next((int(mixer.chunk_size) for mixer in mamba_mixers(self._body)), 1)

    def implementations(self) -> dict[str, str]:
        names = {"attention": "_attn_implementation", "experts": "_experts_implementation"}
        found = {name: getattr(self._body.config, attribute, None) for name, attribute in names.items()}
        return {name: str(value) for name, value in (found | {"reason": self._reason}).items() if value}

    @torch.inference_mode()
    def prefill(self, token_ids: Tensor, layers: tuple[int, ...], chunk_tokens: int) -> Iterator[Piece]:
        length = token_ids.shape[1]
        cache = DynamicCache(config=self._body.config) if length > chunk_tokens else None
        for first in range(0, length, chunk_tokens):
            yield self._piece(token_ids[:, first : first + chunk_tokens], layers, first, cache)

    def block_differences(self, token_ids: Tensor) -> list[float]:
        return []

    def _piece(self, token_ids: Tensor, layers: tuple[int, ...], first: int, cache: Any) -> Piece:
        taps: dict[int, Tensor] = {}
        final: list[Tensor] = []

        def keep(layer: int) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                taps[layer] = block_state(output)

            return hook

        handles = [self._blocks[layer].register_forward_hook(keep(layer)) for layer in layers]
        handles.append(self._final_norm.register_forward_hook(lambda _m, _i, output: final.append(output)))
        try:
            carried = {} if cache is None else {self._cache: cache}
            self._run(input_ids=token_ids, use_cache=cache is not None, **carried)
        finally:
            for handle in handles:
                handle.remove()
        return Piece(first=first, taps=taps, final=final[-1])

    def _run(self, **arguments: Any) -> None:
        if self._model is None:
            self._body(**arguments)
            return

        def stop(_module: nn.Module, _inputs: Any) -> None:
            raise _HeadReachedError

        handle = self._model.get_output_embeddings().register_forward_pre_hook(stop)
        try:
            self._model(**arguments)
        except _HeadReachedError:
            pass
        finally:
            handle.remove()


class _HeadReachedError(Exception):
    """Ends a model's forward before its head, whose logits [B, L, V] would not fit."""
