"""A prepared dataset of random token ids, written without a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from draftcache.capture.prepare.draft_vocabulary import build_vocab_map
from draftcache.capture.prepare.token_dataset import CONVERSATION_DTYPE, conversation_hash
from draftcache.capture.prepare.token_dataset_writer import DatasetWriter
from draftcache.store.common.files import hash_bytes
from draftcache.store.format.vocab_map import VOCAB_MAP_NAME

SPLIT = "train"


def two_answers(length: int) -> NDArray[np.bool_]:
    """Return a loss mask [length] of two answers; the last ids are without loss."""
    mask = np.zeros(length, np.bool_)
    mask[length // 5 : 2 * length // 5] = True
    mask[length // 2 : length - 2] = True
    return mask


def random_conversations(
    lengths: Sequence[int], ids: tuple[int, int], mask: Callable[[int], NDArray[np.bool_]] = two_answers
) -> list[tuple[NDArray[np.uint32], NDArray[np.bool_]]]:
    """Return random token ids in `ids[0] .. ids[1]`, and the loss masks that `mask` makes of the lengths."""
    rng = np.random.default_rng(0)
    return [(rng.integers(*ids, length).astype(np.uint32), mask(length)) for length in lengths]


def write_random_dataset(
    path: Path,
    lengths: Sequence[int],
    *,
    ids: tuple[int, int],
    vocab_size: int,
    draft_vocab_size: int,
    mask: Callable[[int], NDArray[np.bool_]] = two_answers,
) -> Path:
    """Write `random_conversations` as a prepared dataset with one split and a draft-vocabulary map."""
    with DatasetWriter(path) as writer:
        split = writer.open_splits([SPLIT], vocab_size)[SPLIT]
        for line, (token_ids, loss_mask) in enumerate(random_conversations(lengths, ids, mask), start=1):
            row = np.zeros(1, CONVERSATION_DTYPE)
            row["content_hash"] = conversation_hash(token_ids, loss_mask)
            row["tokens"] = row["untruncated_tokens"] = token_ids.size
            row["loss_tokens"], row["source_line"] = int(loss_mask.sum()), line
            split.append(token_ids, loss_mask, row)
        split.close()
        build_vocab_map({SPLIT: split.counts}, draft_vocab_size).save(writer.partial / VOCAB_MAP_NAME)
        nothing = hash_bytes(b"")
        writer.commit(
            {
                "tokenizer": {"hash": nothing},
                "chat_template": {"hash": nothing},
                "vocab_size": vocab_size,
                "splits": {SPLIT: {"held_out": False, "sources": [], **split.record()}},
            }
        )
    return path
