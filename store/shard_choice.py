"""Which shards a verification checks, and which of these it reads in full."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from draftcache.store.common.errors import InputError
from draftcache.store.common.files import hash_json

SAMPLE_RULE = (
    "the n shards to check are put in the order of the xxh3-128 of the JSON text [manifest hash, shard number]; seed s "
    "reads the next m = ceil(share * n) of them from place s * m on, and goes round at the end"
)
"""How a sample is chosen. The seeds 0 to ceil(1 / share) - 1 read every shard between them."""


@dataclass(frozen=True, kw_only=True)
class ShardChoice:
    """Which shards a verification checks. Raises InputError for settings that are out of range or do not go together.

    The settings are those of `draftcache.store.verify.verify_store`.
    """

    quick: bool = False
    shards: tuple[int, int] | None = None
    sample: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.shards is not None and not 0 <= self.shards[0] <= self.shards[1]:
            raise InputError(
                f"--shards: expected numbers A-B with 0 <= A <= B, found {self.shards[0]}-{self.shards[1]}"
            )
        if self.sample is not None and not 0 < self.sample <= 1:
            raise InputError(f"--sample: expected a share above 0 and at most 1, found {self.sample}")
        if self.sample is not None and self.quick:
            raise InputError(
                "--sample: expected it without --quick, found both; --quick reads no shard in full, --sample a share"
            )
        if self.seed < 0:
            raise InputError(f"--seed: expected a number of at least 0, found {self.seed}")
        if self.seed and self.sample is None:
            raise InputError(f"--seed: expected --sample beside it, found --seed {self.seed} alone")

    def chosen(self, committed: Sequence[int], planned: int) -> list[int]:
        """Return those of the `committed` shards that are checked, of a store whose manifest plans `planned` shards.

        Raises InputError where `shards` names one that is not planned.
        """
        if self.shards is None:
            return list(committed)
        first, last = self.shards
        if last >= planned:
            raise InputError(
                f"--shards: expected numbers from 0 to {planned - 1}, as the store has {planned} shards, found "
                f"{first}-{last}"
            )
        return [number for number in committed if first <= number <= last]

    def in_full(self, chosen: Sequence[int], manifest_hash: str) -> set[int]:
        """Return those of the `chosen` shards that are read in full, by `SAMPLE_RULE` where there is a sample."""
        if self.quick or not chosen:
            return set()
        if self.sample is None:
            return set(chosen)
        order = sorted(chosen, key=lambda number: hash_json([manifest_hash, number]))
        count = math.ceil(round(self.sample * len(order), 6))  # 0.07 * 100 is 7.000000000000001
        return {order[(self.seed * count + place) % len(order)] for place in range(count)}

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON values, with the rule of the sample where there is one."""
        return asdict(self) | {"rule": None if self.sample is None else SAMPLE_RULE}
