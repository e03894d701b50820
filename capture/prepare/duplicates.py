"""Equal conversations of a dataset, within a split and across splits, by their content hash.

Two conversations are equal if their token ids and loss masks are, as stored: after truncation. One table serves all
splits of a dataset, which are written one after the other, and holds about 150 bytes per distinct conversation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


class DuplicateTable:
    """Notes the content of all rows as they are written, and says which of them are to be kept.

    With `drop`, of equal conversations only the first one is kept, over all splits in the order in which they are
    written: what a held-out split has in common with a training split, which is written before it, stays in the
    training split alone.
    """

    def __init__(self, *, drop: bool = False) -> None:
        self.drop = drop
        self._names: list[str] = []
        self._splits_of: dict[bytes, int] = {}  # content hash -> bit i is set where split i has the content
        self._repeated: Counter[str] = Counter()
        self._dropped: dict[str, Counter[str]] = {}
        self._shared: Counter[tuple[str, str]] = Counter()

    def keep(self, split: str, digests: Sequence[bytes]) -> np.ndarray:
        """Note the content hashes of the next rows of a split. Returns bool [rows], False where a row is dropped."""
        if split not in self._names:
            self._names.append(split)
        return np.array([self._keep(split, digest) for digest in digests], np.bool_)

    def _keep(self, split: str, digest: bytes) -> bool:
        own = 1 << self._names.index(split)
        found = self._splits_of.get(digest, 0)
        if found and self.drop:
            self._dropped.setdefault(split, Counter())[self._first_name(found)] += 1
            return False
        if found:
            self._repeated[split] += bool(found & own)
            self._shared.update((name, split) for number, name in enumerate(self._names) if found & ~own & 1 << number)
        self._splits_of[digest] = found | own
        return True

    def _first_name(self, found: int) -> str:
        return self._names[(found & -found).bit_length() - 1]

    def repeated_rows(self, split: str) -> int:
        """Return the number of kept rows whose content an earlier row of the split has too."""
        return self._repeated[split]

    def dropped_rows(self, split: str) -> dict[str, int]:
        """Return how many rows of the split were dropped, by the split that has the first row of the same content."""
        return dict(self._dropped.get(split, {}))

    def shared_rows(self) -> list[dict[str, Any]]:
        """Return {"splits": [a, b], "rows": n} of every pair with n > 0: rows of b, the later one, that a has too."""
        return [{"splits": list(pair), "rows": rows} for pair, rows in self._shared.items()]

    def all_dropped(self) -> dict[str, dict[str, int]]:
        """Return the counts of `dropped_rows` of every split that has any."""
        return {split: dict(counts) for split, counts in self._dropped.items()}

    def restore_dropped(self, dropped: Mapping[str, Mapping[str, int]]) -> None:
        """Take over the counts of `all_dropped` of an earlier run, whose kept rows are noted by `keep` again."""
        self._dropped = {split: Counter(counts) for split, counts in dropped.items()}
