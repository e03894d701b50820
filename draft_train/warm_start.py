"""Warm start: a run begins with another run's weights and a fresh optimizer, as the second of two stages does.

The rows of a draft's head belong to token ids through the draft vocabulary, which is a map that was made from some
data. Weights that are loaded under another map of the same size fit in shape and are permuted in meaning, which no
loss curve shows at once. So another map is refused, unless the rows are asked to be moved by their token ids.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from draftcache.draft_train.checkpoint import load_state, load_vocab_map, load_weights, read_weights
from draftcache.draft_train.drafts.protocol import CheckpointState, Draft
from draftcache.draft_train.fit import require_equal, require_verifier, require_window
from draftcache.store.format.vocab_map import VocabMap
from draftcache.store.reader import StoreReader


def warm_start(
    path: Path, draft: Draft, architecture: str, store: StoreReader, vocab_map: VocabMap, *, remap: bool, say: bool
) -> None:
    """Copy the weights of checkpoint `path` into `draft`, which is initialised and whose draft ids are `vocab_map`'s.

    With `remap`, the checkpoint may have another draft vocabulary, of any size. Rows that belong to draft ids are then
    copied where both vocabularies have the token id, and stay as initialised elsewhere; `say` prints how many do.

    Raises CheckpointError where the checkpoint is damaged, belongs to another verifier, to other taps, to another
    architecture or shape, or, without `remap`, to another draft vocabulary.
    """
    state = load_state(path)
    require_verifier(path, state, store)
    require_window(state.shape.sliding_window, store)
    require_shape(path, state, draft, architecture, but=("draft_vocab_size",) if remap else ())
    if not remap:
        require_vocabulary(path, state, vocab_map, "pass --remap-vocab to move its head rows by token id")
        load_weights(draft.model, path)
        return
    theirs = load_vocab_map(path, state)
    ours, found = shared_ids(vocab_map, theirs)
    weights = draft.model.state_dict()
    by_draft_id = {name: weights[name] for name in draft.rows_by_draft_id}
    like = {
        name: value.new_empty(len(theirs), *value.shape[1:]) if name in by_draft_id else value
        for name, value in weights.items()
    }
    loaded = read_weights(path, like)
    for name, value in by_draft_id.items():
        moved = value.clone()
        moved[ours.to(value.device)] = loaded[name].to(value.device)[found.to(value.device)]
        loaded[name] = moved
    draft.model.load_state_dict(loaded)
    if say:
        print(
            f"--remap-vocab: {len(ours)} of {len(vocab_map)} head rows were moved from {path} by token id; "
            f"{len(vocab_map) - len(ours)} are new and start as --head-init says; {len(theirs) - len(ours)} of its "
            "rows have no place here",
            file=sys.stderr,
        )


def require_shape(
    path: Path, state: CheckpointState, draft: Draft, architecture: str, *, but: tuple[str, ...] = ()
) -> None:
    """Raise CheckpointError where architecture or shape differ from `draft`'s, except in the shape's fields `but`."""
    require_equal(path, {"draft architecture": (state.architecture, architecture)}, "use the same --draft")
    mine = asdict(draft.shape)
    require_equal(
        path,
        {f"draft {name}": (value, mine[name]) for name, value in asdict(state.shape).items() if name not in but},
        "use the same shape, --draft-vocab-size and --eagle31 included",
    )


def require_vocabulary(path: Path, state: CheckpointState, vocab_map: VocabMap, remedy: str) -> None:
    """Raise CheckpointError where the checkpoint's draft ids stand for other token ids than those of `vocab_map`."""
    require_equal(
        path,
        {"draft vocabulary": (state.draft_vocab_hash, vocab_map.hash)},
        f"the rows of its head belong to other tokens; {remedy}, or train on a store captured with its vocabulary",
    )


def shared_ids(ours: VocabMap, theirs: VocabMap) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the draft ids, in `ours` and in `theirs`, of the token ids that both have: two tensors [n] int64."""
    found = theirs.padded(ours.vocab_size).target_to_draft()[ours.target_ids]
    here = np.flatnonzero(found >= 0)
    return torch.from_numpy(here), torch.from_numpy(found[here].astype(np.int64))
