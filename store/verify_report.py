"""What `verify_store` looked at, and what it found."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from draftcache.store.shard_checks import Damage
from draftcache.store.shard_choice import ShardChoice


@dataclass(kw_only=True)
class VerifyReport:
    """What `verify_store` looked at and what it found.

    Each committed shard is counted once: in `read_in_full`, `checked_by_size`, `unreadable` or `not_looked_at`.
    """

    location: str
    """Path or URL of the store."""
    quick: bool
    """Whether only records and sizes were checked."""
    choice: ShardChoice = field(default_factory=ShardChoice)
    """Which shards were to be checked."""
    shards: int = 0
    """Shards that the manifest plans."""
    committed: int = 0
    """Shards that have a commit record."""
    read_in_full: int = 0
    """Shards of which every byte was read and every value was checked."""
    checked_by_size: int = 0
    """Shards of which only the commit record and the files' sizes were checked."""
    unreadable: int = 0
    """Shards whose commit record is damaged or another one's, so that their files could not be checked."""
    not_looked_at: int = 0
    """Committed shards that the settings left out."""
    from_journal: int = 0
    """How many of the checked shards an earlier run has checked, as the journal says. They were not read again."""
    conversations: int = 0
    """Conversations of the checked shards."""
    bytes: int = 0
    """Bytes of the checked shards' files, as the records say."""
    indexed: bool = False
    """Whether the store's index is committed, which capture writes last."""
    damages: list[Damage] = field(default_factory=list)
    """Everything that is not as it was committed."""
    strays: list[str] = field(default_factory=list)
    """Files below shards/ that no commit record names. They are no part of the store. Files of shards that were not
    looked at are not judged."""

    @property
    def finished(self) -> bool:
        """Whether every planned shard is committed, and the whole store's index too."""
        return self.committed == self.shards and self.indexed

    @property
    def complete(self) -> bool:
        """Whether every committed shard was read in full."""
        return self.read_in_full == self.committed

    @property
    def damaged_shards(self) -> list[int]:
        """Numbers of the damaged shards, ascending."""
        return sorted({item.shard for item in self.damages if item.shard is not None})

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self) | {
            "choice": self.choice.to_json(),
            "finished": self.finished,
            "complete": self.complete,
            "damaged_shards": self.damaged_shards,
        }
