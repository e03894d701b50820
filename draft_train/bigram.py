"""The bigram baseline: a table of each token's most frequent successor, used as a draft that needs no training."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from draftcache.store.reader import StoreReader

_PAIRS = 1 << 22
"""Pairs that are held before they are counted: 32 MB, however large the store."""


def bigram_table(store: StoreReader, members: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return [V] int64: each token's most frequent successor written by the assistant; -1 if it has none.

    Among equally frequent successors the lowest id wins. Memory grows with the pairs that differ, not with the tokens.
    """
    vocab = int(store.manifest.verifier["vocab_size"])
    counted = _PairCounts()
    for number in members:
        item = store.read(int(number), ["token_ids", "loss_mask"])
        tokens = item.arrays["token_ids"].astype(np.int64)
        written = item.loss_mask[1:]
        counted.add(tokens[:-1][written] * vocab + tokens[1:][written])
    keys, counts = counted.finish()
    order = np.lexsort((keys, -counts))
    previous, successor = keys[order] // vocab, keys[order] % vocab
    seen, first_rows = np.unique(previous, return_index=True)
    table = np.full(vocab, -1, np.int64)
    table[seen] = successor[first_rows]
    return table


class _PairCounts:
    """Counts keys as they come."""

    def __init__(self) -> None:
        self._keys, self._counts = np.empty(0, np.int64), np.empty(0, np.int64)
        self._waiting: list[NDArray[np.int64]] = []
        self._size = 0

    def add(self, keys: NDArray[np.int64]) -> None:
        self._waiting.append(keys)
        self._size += keys.size
        if self._size >= _PAIRS:
            self._count()

    def finish(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the keys, ascending, and how often each was added."""
        self._count()
        return self._keys, self._counts

    def _count(self) -> None:
        if not self._waiting:
            return
        keys, counts = np.unique(np.concatenate(self._waiting), return_counts=True)
        self._waiting, self._size = [], 0
        joined = np.concatenate((self._keys, keys))
        self._keys, rows = np.unique(joined, return_inverse=True)
        weights = np.concatenate((self._counts, counts))
        # Sums of float64 are exact here: no count reaches 2^53.
        self._counts = np.bincount(rows, weights=weights, minlength=self._keys.size).astype(np.int64)
