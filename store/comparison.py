"""Compares the conversations of a copy with those of the store that it was made of, array by array."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from draftcache.store.common.errors import StoreError
from draftcache.store.format.array_spec import tap_name
from draftcache.store.format.bf16 import bf16_to_float32, float32_to_bf16
from draftcache.store.format.schema import Conversation
from draftcache.store.format.tap_codecs import LOSSY_MODES
from draftcache.store.reader import StoreReader
from draftcache.store.tap_choice import names_with_taps


def compare_conversations(source: StoreReader, first: int, last: int, copy: StoreReader) -> dict[int, float]:
    """Compare all conversations of `copy` with the source's `first .. last-1`, in all arrays but taps it doesn't have.

    Where the copy's mode is lossy and the source's is another, taps are measured instead: the result holds the largest
    `normalised_error` of a conversation by tap, and is {} otherwise. Raises StoreError, which names the conversation,
    where an array differs or the copy holds other conversations.
    """
    if len(copy) != last - first:
        raise StoreError(
            f"{copy.location}: expected {last - first} conversations as in {source.location}, read back {len(copy)}"
        )
    lossy = copy.manifest.mode in LOSSY_MODES and copy.manifest.mode != source.manifest.mode
    errors: dict[int, float] = {}
    names = names_with_taps(source, copy.manifest.layers)
    for number in range(first, last):
        expected, found = source.read(number, names), copy.read(number - first)
        for layer, error in _compare(expected, found, source, copy, lossy=lossy).items():
            errors[layer] = max(errors.get(layer, 0.0), error)
    return errors


def _compare(
    expected: Conversation, found: Conversation, source: StoreReader, copy: StoreReader, *, lossy: bool
) -> dict[int, float]:
    """Compare one conversation. Returns the errors of taps by layer, where they may have any."""
    if (expected.content_hash, expected.split, expected.dataset_index) != (
        found.content_hash,
        found.split,
        found.dataset_index,
    ):
        raise StoreError(
            f"{copy.location}: expected conversation {expected.content_hash} as in {source.location}, read back "
            f"{found.content_hash}; check the disk and the memory, then run `draftcache verify` on both"
        )
    taps = {tap_name(layer): layer for layer in source.manifest.layers}
    errors = {}
    for name, values in expected.arrays.items():
        mine = found.arrays[name]
        if name in taps and mine.dtype != values.dtype:
            values = float32_to_bf16(values)
        if name in taps and lossy:
            errors[taps[name]] = normalised_error(mine, values)
        elif (mine.dtype, mine.shape, mine.tobytes()) != (values.dtype, values.shape, values.tobytes()):
            raise StoreError(
                f"{copy.location}: conversation {expected.content_hash}: expected {name} as in {source.location}, "
                "read back other values; check the disk and the memory, then run `draftcache verify` on both"
            )
    return errors


def normalised_error(found: NDArray[np.uint16], expected: NDArray[np.uint16]) -> float:
    """Return the rms of the difference of bf16 states [R, H], after dividing by each channel's rms over these rows."""
    if not expected.size:
        return 0.0
    one, two = (bf16_to_float32(states).astype(np.float64) for states in (found, expected))
    rms = np.sqrt(np.square(two).mean(axis=0))
    return float(np.sqrt(np.square((one - two) / np.where(rms > 0, rms, 1)).mean()))
