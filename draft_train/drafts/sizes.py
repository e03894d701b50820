"""What decides how large a draft and a training step are: shapes, rows, and the kinds of memory."""

from __future__ import annotations

from dataclasses import Field, dataclass
from typing import Any, ClassVar, Protocol

from draftcache.store.reader import StoreReader

MEMORY_KINDS = (
    "weights and optimizer", "frozen weights", "micro-batch", "next micro-batch", "kept for backward", "working",
)  # fmt: skip
"""What `Architecture.peak_bytes` tells apart. The first is each run's own for its whole time; runs that train side by
side on a device share the frozen weights, and all else serves one run after the other."""


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
