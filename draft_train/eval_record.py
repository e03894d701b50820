"""What an evaluation keeps of every conversation, so that a later one can be compared with it in pairs.

The JSON file of `draftcache eval --output` holds, beside the figures, the store's hash and by split: the `content_hash`
of each conversation, its `dataset_index` and `length` in tokens, and for each draft `counts`, nested lists [C, B, 2]:
the verify steps and tokens of each conversation by bucket of position.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftcache.draft_train.acceptance import AcceptanceCounts
from draftcache.store.common.errors import InputError, ManifestMismatchError
from draftcache.store.common.files import read_json
from draftcache.store.reader import StoreReader

KIND = "draftcache evaluation"
"""The value of `kind` in such a file, by which it is told from other JSON."""


def conversation_record(
    store: StoreReader, members: NDArray[np.int64], found: Mapping[str, AcceptanceCounts]
) -> dict[str, Any]:
    """Return what the file holds of the conversations of a split, as JSON values."""
    index = store.index[members]
    return {
        "content_hash": [row["content_hash"].tobytes().hex() for row in index],
        "dataset_index": index["dataset_index"].tolist(),
        "length": index["tokens"].tolist(),
        "counts": {name: counts.by_conversation.tolist() for name, counts in found.items()},
    }


def read_evaluation(path: Path) -> dict[str, Any]:
    """Return the content of a file that `draftcache eval --output` wrote. Raises InputError for anything else."""
    try:
        body = read_json(path)
    except (OSError, ValueError) as exc:
        raise InputError(f"{path}: expected a file of `draftcache eval --output`, could not read it ({exc})") from exc
    if not isinstance(body, dict) or body.get("kind") != KIND:
        raise InputError(f"{path}: expected a file of `draftcache eval --output`, found other JSON, or an older form")
    return body


def recorded_counts(
    path: Path, split: str, store: StoreReader, members: NDArray[np.int64], like: AcceptanceCounts
) -> AcceptanceCounts:
    """Return the counts of the draft in an evaluation's file, for a comparison on these conversations.

    `like` are the counts to compare with. Raises ManifestMismatchError where store, split, conversations, draft tokens
    or buckets differ, as counts on other conversations make no pairs.
    """
    body = read_evaluation(path)
    record = body["conversations"].get(split, {"content_hash": None})
    hashes = [row.tobytes().hex() for row in store.index["content_hash"][members]]
    pairs = {
        "store": (store.manifest.hash, body["store_hash"]),
        "draft tokens": (like.draft_tokens, body["draft_tokens"]),
        "length buckets": (list(like.edges), body["length_buckets"]),
        f"conversations of {split!r}": (hashes, record["content_hash"]),
    }
    for name, (expected, found) in pairs.items():
        if expected != found:
            shown = (expected, found) if not isinstance(expected, list) or len(expected) < 9 else ("these", "others")
            raise ManifestMismatchError(
                f"--compare {path}: expected {name} {shown[0]}, found {shown[1]}: only evaluations of the same "
                "conversations can be compared; evaluate that draft again with the flags of this one"
            )
    figures = body["splits"][split]["draft"]
    return AcceptanceCounts(
        draft_tokens=like.draft_tokens,
        edges=like.edges,
        members=len(members),
        conversations=len(members),
        by_conversation=np.array(record["counts"]["draft"], np.int64).reshape(like.by_conversation.shape),
        proposals=np.array(figures["proposals"], np.int64),
        accepted=np.array(figures["accepted"], np.int64),
        teacher_positions=like.teacher_positions,
        agreements=like.agreements,
    )
