"""The conversations that a draft serves best and worst, token by token: which tokens it won, and what it proposed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from draftcache.draft_train.acceptance import AcceptanceCounts, walk_chain
from draftcache.draft_train.data.batches import build_batch
from draftcache.draft_train.data.frozen import FrozenWeights
from draftcache.draft_train.drafts.protocol import Draft
from draftcache.store.format.rows import start_rows, tokens_left
from draftcache.store.reader import StoreReader

FEWEST_STEPS = 8
"""Verify steps of a conversation below which its acceptance says little; they are shown only where there are no others.
"""
MOST_TOKENS = 1_500
"""Tokens of a conversation that are shown. The rest is left out."""

PROMPT, VERIFIED, ACCEPTED, REJECTED, BONUS = range(5)
"""Fates of a token: of the prompt; the first of a turn, which the verifier writes before any draft; an accepted draft
token; the verifier's token where the draft's was rejected; and its token after draft tokens that were all accepted.
"""


def choose_examples(counts: AcceptanceCounts, each: int) -> tuple[list[int], list[int]]:
    """Return the rows of `counts.by_conversation` with the longest and with the shortest acceptance, `each` of both."""
    steps, tokens = counts.by_conversation.sum(axis=1).T
    rows = np.flatnonzero(steps >= FEWEST_STEPS)
    if rows.size == 0:
        rows = np.flatnonzero(steps > 0)
    order = rows[np.argsort(-tokens[rows] / steps[rows], kind="stable")].tolist()
    best = order[: min(each, (len(order) + 1) // 2)]
    worst = order[::-1][: min(each, len(order) - len(best))]
    return best, worst


def example(
    store: StoreReader, number: int, draft: Draft, frozen: FrozenWeights, *, draft_tokens: int
) -> dict[str, Any]:
    """Return conversation `number` as JSON values.

    `token_ids` and `fates` are by token, at most 1,500 of them. `proposed` has, by the position of a REJECTED token as
    a string, the verifier's id of what the draft proposed there. `acceptance_length` is that of the whole conversation.
    """
    item = store.read(number, decode=False)
    window = draft.shape.sliding_window
    batch = build_batch([item], store.codec, max_steps=draft_tokens, window=window, device=frozen.embed_tokens.device)
    target_ids = store.vocab_map(draft.shape.draft_vocab_size).target_ids
    choices = draft.propose(frozen, batch, draft_tokens).cpu().numpy()
    proposals = np.where(choices >= 0, target_ids[choices.clip(min=0)], -1)
    argmax = batch.argmax[batch.teacher_index].cpu().numpy()
    starts = start_rows(item.loss_mask)
    left = tokens_left(item.loss_mask, starts)
    visited, taken, gains = walk_chain(left, proposals == argmax)
    fates = np.where(item.loss_mask, VERIFIED, PROMPT)
    proposed = {}
    for row, accepted, gained in zip(visited.tolist(), taken.tolist(), gains.tolist(), strict=True):
        first = int(starts[row]) + 2  # the start row's own next token is known, the draft predicts those behind it
        fates[first : first + accepted] = ACCEPTED
        if gained > accepted:
            place = first + accepted
            fates[place] = BONUS if accepted == draft_tokens else REJECTED
            if accepted < draft_tokens:
                proposed[str(place)] = int(proposals[row, accepted])
    shown = slice(*_shown(item.loss_mask))
    return {
        "split": store.manifest.splits[item.split],
        "dataset_index": item.dataset_index,
        "tokens": len(fates),
        "first": shown.start,
        "acceptance_length": float(gains.sum() / max(1, len(visited))),
        "verify_steps": len(visited),
        "token_ids": item.arrays["token_ids"][shown].tolist(),
        "fates": fates[shown].tolist(),
        "proposed": {place: token for place, token in proposed.items() if shown.start <= int(place) < shown.stop},
    }


def _shown(mask: NDArray[np.bool_]) -> tuple[int, int]:
    """Return the tokens that are shown: from a little before the first turn, where the prompt is long."""
    opening = int(np.argmax(mask)) if mask.any() else 0
    first = max(0, opening - MOST_TOKENS // 3)
    return first, min(len(mask), first + MOST_TOKENS)


@torch.inference_mode()
def examples(
    store: StoreReader,
    members: NDArray[np.int64],
    counts: AcceptanceCounts,
    draft: Draft,
    frozen: FrozenWeights,
    *,
    each: int,
) -> dict[str, list[dict[str, Any]]]:
    """Return the `best` and `worst` conversations of `members`, as `example` describes them, the extreme ones first."""
    return {
        name: [example(store, int(members[row]), draft, frozen, draft_tokens=counts.draft_tokens) for row in rows]
        for name, rows in zip(("best", "worst"), choose_examples(counts, each), strict=True)
    }
