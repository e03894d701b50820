"""What decides how large a draft and a training step are: shapes, rows, and the kinds of memory."""

from __future__ import annotations

from dataclasses import Field, asdict, dataclass
from typing import Any, ClassVar, Protocol

from draftcache.store.common.errors import InputError
from draftcache.store.reader import StoreReader

MEMORY_KINDS = (
    "weights and optimizer", "frozen weights", "micro-batch", "next micro-batch", "kept for backward", "working",
)  # fmt: skip
"""What `Architecture.peak_bytes` tells apart. The first is each run's own for its whole time; runs that train side by
side on a device share the frozen weights, and all else serves one run after the other."""


def require_sizes(shape: Any, may_be_less: tuple[str, ...] = ()) -> None:
    """Raise InputError where a number in a draft's shape, a dataclass, is not above 0, or its heads can't be grouped
    or rotated. Numbers that `may_be_less` names are not looked at.
    """
    for name, value in asdict(shape).items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and name not in may_be_less and value <= 0:
            raise InputError(f"draft shape: expected {name} above 0, found {value}")
    if shape.num_attention_heads % shape.num_key_value_heads:
        raise InputError(
            f"draft shape: expected attention heads in groups of the {shape.num_key_value_heads} key-value heads, "
            f"found {shape.num_attention_heads}"
        )
    if shape.head_dim % 2:
        raise InputError(f"draft shape: expected an even head_dim for rotary embeddings, found {shape.head_dim}")


class Shape(Protocol):
    """The shape of a draft: a frozen dataclass of JSON values with at least these fields."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def hidden_size(self) -> int:
        """Width of the verifier's states, which the draft reads."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids of the verifier."""

    @property
    def draft_vocab_size(self) -> int:
        """Number of token ids that the draft can propose."""

    @property
    def sliding_window(self) -> int | None:
        """Window in positions: a row attends to keys fewer than this many positions back; None attends to all keys."""


@dataclass(frozen=True, kw_only=True)
class VerifierShape:
    """The part of a draft's shape that the verifier and its store decide."""

    hidden_size: int
    taps: int
    """Captured block outputs per row."""
    vocab_size: int
    draft_vocab_size: int
    rms_norm_eps: float

    @classmethod
    def of(cls, store: StoreReader, draft_vocab_size: int) -> VerifierShape:
        """Return the shape for a store. `draft_vocab_size` 0 chooses its main draft vocabulary.

        Raises InputError where the store has no draft vocabulary of this size.
        """
        manifest = store.manifest
        return cls(
            hidden_size=manifest.hidden_size,
            taps=len(manifest.taps),
            vocab_size=int(manifest.verifier["vocab_size"]),
            draft_vocab_size=manifest.teacher_form.choose(draft_vocab_size).size,
            rms_norm_eps=float(manifest.verifier["rms_norm_eps"]),
        )


@dataclass(frozen=True, kw_only=True)
class BatchRows:
    """The size of a micro-batch, for the memory estimate."""

    rows: int
    """Key rows, whose taps are read."""
    starts: int
    """Start rows."""
    top_k: int
    """Teacher entries per start row; 0 where the store holds final-norm states instead."""
