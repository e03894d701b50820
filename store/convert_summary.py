"""What one run of a conversion did, in numbers."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ConvertSummary:
    """What one run of a conversion did."""

    shards: int = 0
    """Shards that this run wrote."""
    finished: bool = False
    """Whether every shard of the target is committed, and its index too."""
    missing: list[int] = field(default_factory=list)
    """Shards of the target that are not committed yet, because another run writes them; ascending."""
    bytes_before: int = 0
    """Bytes of the source's shard files."""
    bytes_after: int = 0
    """Bytes of the target's committed shard files."""
    tokens: int = 0
    """Tokens of the store."""
    conversations: int = 0
    """Conversations of the target's committed shards; all of the source's where the copy is finished."""
    checked: int = 0
    """Conversations that were read back and compared."""
    largest_error: dict[int, float] = field(default_factory=dict)
    """By tap, the largest `comparison.normalised_error` of a conversation. Only a change to a lossy mode has errors."""

    def add_errors(self, errors: dict[int, float], conversations: int) -> None:
        """Count conversations that were compared, with the largest error by tap that was found among them."""
        self.checked += conversations
        for layer, error in errors.items():
            self.largest_error[layer] = max(self.largest_error.get(layer, 0.0), error)
