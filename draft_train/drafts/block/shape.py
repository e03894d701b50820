"""The shape of a block draft, DFlash or DSpark. This module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from draftcache.draft_train.drafts.sizes import require_sizes
from draftcache.store.common.errors import InputError

LAYER_TYPES = ("sliding", "full")
"""What a layer's attention reaches: a window of positions, or everything before."""


@dataclass(frozen=True, kw_only=True)
class BlockShape:
    """The shape of a Qwen3-type draft that proposes a block of tokens at once. Raises InputError where none is so."""

    hidden_size: int
    """Equals the verifier's hidden size, because the draft reads its embeddings and states."""
    taps: int
    """Number of taps that are concatenated into the input of `fc`."""
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    window: int | None
    """Window of the sliding layers in positions; None where there are none."""
    layer_types: tuple[str, ...]
    """"sliding" or "full", for each layer."""
    causal: tuple[bool, ...]
    """By layer, whether a slot sees only itself and the slots of its block before it; otherwise it sees them all."""
    rope_theta: float
    rms_norm_eps: float
    block_size: int
    """Slots of a block."""
    bonus_anchor: bool
    """Whether the anchor's slot predicts nothing: a block of B slots then proposes B - 1 tokens, otherwise B."""
    mask_token_id: int
    """Token id whose embedding stands in every slot but the anchor's; -1 where it is not chosen yet."""
    markov_rank: int = 0
    """Rank of the bias of the logits by the token before; 0 where there is none."""
    attention_sinks: bool = False
    confidence_head: bool = False
    train_embeddings: bool = False
    train_head: bool = False

    def __post_init__(self) -> None:
        require_sizes(self, ("markov_rank", "mask_token_id"))
        if len(self.layer_types) != self.num_hidden_layers or not set(self.layer_types) <= set(LAYER_TYPES):
            raise InputError(
                f"--layer-types: expected one of {LAYER_TYPES} for each of {self.num_hidden_layers} layers, found "
                f"{list(self.layer_types)}"
            )
        if "sliding" in self.layer_types and self.window is None:
            raise InputError("--sliding-window: expected a window for the sliding layers, found 0")
        if not -1 <= self.mask_token_id < self.vocab_size:
            raise InputError(
                f"--mask-token-id: expected one of the verifier's {self.vocab_size} ids, found {self.mask_token_id}"
            )
        if self.steps < 1:
            raise InputError("--block-size: expected 2 slots or more where the anchor's predicts nothing, found 1")

    @property
    def steps(self) -> int:
        """Tokens that a whole block proposes."""
        return self.block_size - self.bonus_anchor

    @property
    def sliding_window(self) -> int | None:
        """The widest window of a layer; None where a layer is full."""
        return None if "full" in self.layer_types else self.window

    def slots(self, tokens: int) -> int:
        """Return how many slots propose so many tokens."""
        return tokens + self.bonus_anchor

    @classmethod
    def read(cls, values: dict[str, Any]) -> BlockShape:
        """Return the shape that a checkpoint's JSON holds. Raises InputError where it is no such shape."""
        try:
            tuples = {name: tuple(values[name]) for name in ("layer_types", "causal")}
            return cls(**values | tuples)
        except (TypeError, KeyError) as exc:
            raise InputError(f"expected the shape of a block draft, found {values} ({exc})") from exc
