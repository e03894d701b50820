"""The shape of an Eagle3 draft. This module imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from draftcache.draft_train.drafts.sizes import require_sizes


@dataclass(frozen=True, kw_only=True)
class Eagle3Shape:
    """The shape of a one-layer Llama draft in the classic Eagle3 form. Raises InputError for an impossible shape."""

    hidden_size: int
    """Equals the verifier's hidden size, because the draft reads its embeddings and states."""
    taps: int
    """Number of taps that are concatenated into the input of `fc`."""
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    sliding_window: int | None
    """Window in positions: a row attends to keys fewer than this many positions back; None attends to all keys."""
    rope_theta: float
    rms_norm_eps: float
    fc_norm: bool = False
    """Whether each tap goes through an RMS norm of its own before `fc`. The defaults are those of older checkpoints."""
    norm_output: bool = False
    """Whether a step consumes the previous step's output after the final norm, which the head reads too."""

    def __post_init__(self) -> None:
        require_sizes(self)
