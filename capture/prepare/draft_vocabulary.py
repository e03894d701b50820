"""Build one draft-vocabulary map from the token counts of every training stage, and report what it covers.

The map is built once, from the union of all stages, before anything is captured: if the second stage derived its own
map, that map would permute the head that the first stage trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from draftcache.store.common.errors import InputError
from draftcache.store.format.vocab_map import VocabMap

UNION = "union"
CURVE_SIZES = tuple(1024 << power for power in range(7))
"""Sizes of draft vocabularies, 1,024 .. 65,536 ids, at which `coverage_curve` says what they would cover."""


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """The part of one input's loss-masked tokens that a map covers."""

    name: str
    loss_tokens: int  # all tokens that the assistant wrote
    unique_ids: int
    covered_tokens: int
    covered_ids: int

    @property
    def lost_tokens(self) -> int:
        """Loss-masked tokens whose id the draft cannot propose."""
        return self.loss_tokens - self.covered_tokens

    @property
    def fraction(self) -> float:
        """Covered share of the loss-masked tokens, 0..1; 1 where there are none."""
        return self.covered_tokens / self.loss_tokens if self.loss_tokens else 1.0

    def as_json(self) -> dict[str, Any]:
        """The record for a manifest."""
        return {**asdict(self), "lost_tokens": self.lost_tokens, "fraction": self.fraction}


def build_vocab_map(counts: Mapping[str, np.ndarray], size: int) -> VocabMap:
    """The map of the `size` most frequent ids over all inputs, by (count descending, id ascending), then sorted.

    `counts`: input name -> int64 [V], loss-masked tokens per id. Where fewer than `size` ids were ever seen, the lowest
    unused ids fill the map, so that it has `size` ids for any data. Raises InputError for a size outside of 1..V.
    """
    total = union_counts(counts)
    if not 0 < size <= len(total):
        raise InputError(f"draft vocabulary size: expected 1..{len(total)} (the vocabulary), found {size}")
    ids = np.sort(_by_frequency(total)[:size]).astype(np.int64)
    return VocabMap(target_ids=ids, vocab_size=len(total), sources=tuple(counts))


def _by_frequency(total: np.ndarray) -> np.ndarray:
    """All ids by (count descending, id ascending), from counts int64 [V]."""
    # The sort is stable, so equal counts (zero included) stay in id order, which breaks ties and fills a map.
    return np.argsort(-total, kind="stable")


def load_vocab_maps(main: Path, more: Sequence[Path]) -> list[VocabMap]:
    """Load the main draft-vocabulary map of a store, then the further ones.

    Raises InputError where they are over different vocabularies, or where two have the same size, as the store tells
    them apart by their sizes.
    """
    maps = [VocabMap.load(main)]
    for path in more:
        found = VocabMap.load(path)
        if found.vocab_size != maps[0].vocab_size:
            raise InputError(
                f"--more-vocab-maps {path}: expected a map over {maps[0].vocab_size} token ids, as {main} is, "
                f"found one over {found.vocab_size}; it was made for another tokenizer"
            )
        if (size := len(found)) in (sizes := [len(item) for item in maps]):
            raise InputError(
                f"--more-vocab-maps {path}: expected a size other than {sizes}, found {size}; make one of another size"
            )
        maps.append(found)
    return maps


def union_counts(counts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Counts int64 [V] summed over inputs. Raises InputError where there is no input or V differs."""
    if not counts:
        raise InputError("vocabulary map: expected token counts of at least one input, found none")
    sizes = {name: len(array) for name, array in counts.items()}
    if len(set(sizes.values())) > 1:
        raise InputError(f"vocabulary map: expected one vocabulary size for all inputs, found {sizes}")
    total: np.ndarray = np.sum([array.astype(np.int64) for array in counts.values()], axis=0)
    return total


def coverage_of(name: str, counts: np.ndarray, vocab_map: VocabMap) -> Coverage:
    """Coverage of one input's counts, int64 [V]."""
    inside = counts[vocab_map.target_ids]
    return Coverage(
        name=name,
        loss_tokens=int(counts.sum()),
        unique_ids=int(np.count_nonzero(counts)),
        covered_tokens=int(inside.sum()),
        covered_ids=int(np.count_nonzero(inside)),
    )


def coverage_table(
    counts: Mapping[str, np.ndarray], vocab_map: VocabMap, held_out: Mapping[str, np.ndarray] | None = None
) -> list[Coverage]:
    """One row per counted input, one for their union, then one per held-out input (not in the union)."""
    rows = [coverage_of(name, array, vocab_map) for name, array in counts.items()]
    rows.append(coverage_of(UNION, union_counts(counts), vocab_map))
    return rows + [coverage_of(name, array, vocab_map) for name, array in (held_out or {}).items()]


def coverage_curve(
    counts: Mapping[str, np.ndarray],
    held_out: Mapping[str, np.ndarray] | None = None,
    sizes: Sequence[int] = CURVE_SIZES,
) -> list[dict[str, Any]]:
    """Say what draft vocabularies of several sizes would cover, each of the most frequent ids over all counted inputs.

    Returns the inputs as in `coverage_table`, each with its `name`, its `loss_tokens` and its `points`: `size`,
    `covered_tokens` and `fraction`, as `Coverage` has them for the map of that size. Sizes above V are left out. Both
    kinds of counts are int64 [V]. Raises InputError where there is no input or V differs.
    """
    total = union_counts(counts)
    order = _by_frequency(total)
    rows = []
    for name, array in {**counts, UNION: total, **(held_out or {})}.items():
        covered, loss_tokens = np.cumsum(array[order]).tolist(), int(array.sum())
        points = [
            {
                "size": size,
                "covered_tokens": covered[size - 1],
                "fraction": covered[size - 1] / loss_tokens if loss_tokens else 1.0,
            }
            for size in sizes
            if size <= len(total)
        ]
        rows.append({"name": name, "loss_tokens": loss_tokens, "points": points})
    return rows
