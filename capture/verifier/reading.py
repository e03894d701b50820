"""How conversations may be read by a verifier: side by side or one by one, in pieces or whole. Each is proved first.

A conversation's states must not depend on what else is read. They do where a model keeps state between calls, where its
positions are scaled by the longest row of a batch, or where its experts have room for so many tokens of a batch only.
And a long conversation can be read in pieces only if the model's cache carries all of its state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from draftcache.capture.verifier.forward import Forward, Piece
from draftcache.capture.verifier.load import Verifier
from draftcache.capture.verifier.self_check import row_difference
from draftcache.store.common.errors import InputError

PIECE = 128
"""Tokens of a piece of the proof: a chunk of most scans."""
_BORDER = 3
"""Rows behind a border that are judged by themselves: a convolution over four tokens that forgets is wrong in these."""
_ALIKE = {torch.float32: 1e-3, torch.bfloat16: 0.05}
"""The demo's verifier is at 0.14 where its SSM state is forgotten."""
_NOTHING_ALIKE = 1.0


class CarefulForward:
    """Reads conversations one by one, or whole, for a model that can't do otherwise. Implements `Forward`."""

    def __init__(self, inner: Forward, *, one_by_one: bool, whole: bool) -> None:
        self.name = inner.name
        self._inner = inner
        self._one_by_one, self._whole = one_by_one, whole

    @property
    def chunk_multiple(self) -> int:
        return self._inner.chunk_multiple

    def implementations(self) -> dict[str, str]:
        reading = {"conversations": "one by one"} if self._one_by_one else {}
        return {**self._inner.implementations(), **reading, **({"pieces": "none"} if self._whole else {})}

    def block_differences(self, token_ids: Tensor) -> list[float]:
        return self._inner.block_differences(token_ids)

    def prefill(self, token_ids: Tensor, layers: tuple[int, ...], chunk_tokens: int) -> Iterator[Piece]:
        chunk_tokens = token_ids.shape[1] if self._whole else chunk_tokens
        if not self._one_by_one:
            yield from self._inner.prefill(token_ids, layers, chunk_tokens)
            return
        # All rows have the same pieces, so that these go on side by side.
        rows = [self._inner.prefill(row[None], layers, chunk_tokens) for row in token_ids]
        for pieces in zip(*rows, strict=True):
            yield Piece(
                first=pieces[0].first,
                taps={layer: torch.cat([piece.taps[layer] for piece in pieces]) for layer in layers},
                final=torch.cat([piece.final for piece in pieces]),
            )


@torch.inference_mode()
def prove_reading(
    verifier: Verifier, layers: tuple[int, ...], token_ids: Tensor, *, in_pieces: bool, drift: float = 0.0
) -> tuple[Verifier, dict[str, float]]:
    """Return the verifier with a forward that reads as it may, and the differences by name.

    `token_ids` [L] int64, L > PIECE; `drift` says how far this model amplifies rounding. The differences are `repeat`
    (a conversation read again, after others), `causal` (with more tokens behind it), `batch` (beside a longer one) and,
    with `in_pieces`, `pieces`, each against the conversation read alone and whole. A model that fails `batch` reads one
    by one, and one whose own code fails `pieces` reads whole. Raises InputError for a model that fails `repeat` or
    `causal`, and for a forward of draftcache that fails any.
    """
    limit = max(_ALIKE[verifier.head.weight.dtype], 3 * drift)
    token_ids = token_ids.to(verifier.device)
    half = token_ids[:PIECE]
    whole = _read(verifier, half[None], layers)
    beside = torch.stack([torch.cat([half, half.flip(0)])[: token_ids.shape[0]], token_ids])
    found = {"batch": _worst(_read(verifier, beside, layers), whole)}
    found["repeat"] = _worst(_read(verifier, half[None], layers), whole)
    found["causal"] = _worst(_read(verifier, token_ids[None], layers), whole)
    if not found["repeat"] <= limit:
        raise InputError(
            f"{type(verifier.model).__name__}: expected a conversation to have the same states when it is read again, "
            f"within {limit:.3g}, found {found['repeat']:.3g}; the model keeps state between calls, so that what is "
            "stored would depend on what was read before"
        )
    if not found["causal"] <= limit:
        raise InputError(
            f"{type(verifier.model).__name__}: expected states that do not depend on the tokens behind them, within "
            f"{limit:.3g}, found {found['causal']:.3g}; with this version of transformers the model is no causal one"
        )
    if in_pieces:
        found["pieces"] = _pieces_difference(verifier, token_ids, layers)
    wrong = {name: value for name, value in found.items() if not value <= limit}
    if wrong and verifier.body_forward.block_differences(token_ids[None]):
        raise InputError(
            f"{type(verifier.model).__name__}: expected conversations to have the same states side by side and in "
            f"pieces as alone and whole, within {limit:.3g}, found {wrong}; forward {verifier.body_forward.name} does "
            "not carry this model's state with these versions: update them"
        )
    if wrong:
        careful = CarefulForward(verifier.body_forward, one_by_one="batch" in wrong, whole="pieces" in wrong)
        verifier = replace(verifier, body_forward=careful)
    return verifier, found


def _read(verifier: Verifier, token_ids: Tensor, layers: tuple[int, ...]) -> Piece:
    (piece,) = verifier.prefill(token_ids, layers, token_ids.shape[1])
    return piece


def _pieces_difference(verifier: Verifier, token_ids: Tensor, layers: tuple[int, ...]) -> float:
    """How far states read in pieces are from those read whole, over the rows behind the first piece.

    It is 1 where the model's own code can't go on behind a piece.
    """
    whole = _read(verifier, token_ids[None], layers)
    try:
        pieces = list(verifier.prefill(token_ids[None], layers, PIECE))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # its cache takes no such model, or no pieces: any exception of it means that it can't
        if verifier.body_forward.block_differences(token_ids[None]):
            raise
        return _NOTHING_ALIKE
    later = {layer: torch.cat([piece.taps[layer][0] for piece in pieces[1:]]) for layer in layers}
    return float(np.max([_row_worst(later[layer], whole.taps[layer][0, PIECE:]) for layer in layers]))


def _worst(found: Piece, expected: Piece) -> float:
    """The largest difference of the taps of the first row of each, over the rows of `expected`."""
    length = expected.final.shape[1]
    return float(np.max([_row_worst(found.taps[k][0, :length], tap[0]) for k, tap in expected.taps.items()]))


def _row_worst(found: Tensor, expected: Tensor) -> float:
    """In float32 the difference of the worst of the rows [l, H]. In bfloat16, where rounding now and then turns a token
    to another expert, the median over all rows or over the first few, whichever is larger.
    """
    rows = (found.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1).clamp(min=1e-30)
    if expected.dtype == torch.float32:
        return float(rows.max())
    return float(np.max([row_difference(found, expected), float(rows[:_BORDER].median())]))
