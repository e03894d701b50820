"""Measures acceptance over a store: micro-batches are read ahead and packed, as in training, and each is read once.

However many drafts are compared, every one of them proposes on the same batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from draftcache.draft_train.acceptance import LENGTH_BUCKETS, AcceptanceCounts, count_chain
from draftcache.draft_train.data.batches import Batch, BatchNeeds
from draftcache.draft_train.data.frozen import FrozenWeights
from draftcache.draft_train.data.order import micro_batches
from draftcache.draft_train.data.packed_batch import BatchLoader
from draftcache.draft_train.data.prefetch import Part, Prefetcher
from draftcache.draft_train.data.teacher import TeacherView
from draftcache.draft_train.drafts.protocol import Draft
from draftcache.draft_train.sampled import Overlaps, SampledCounts
from draftcache.store.common.device import as_current
from draftcache.store.reader import StoreReader

PACK_TOKENS = 32_768
"""Tokens of a micro-batch, unless one conversation has more."""
MOST_BYTES = 8_000_000_000
"""Host memory for reading ahead."""
_PACKED_AT_ONCE = 2_048
"""Conversations that are packed into micro-batches together."""
_AHEAD = 3
"""Micro-batches of the largest size for which there is host memory."""

Hits = Callable[[Batch], Tensor]
"""Returns [S, draft_tokens] bool for a batch: whether the draft's choice for each start row and step is the verifier's.
"""


def measure(
    store: StoreReader,
    members: NDArray[np.int64],
    drafts: Mapping[str, Hits],
    *,
    draft_tokens: int,
    window: int | None,
    device: torch.device,
    edges: tuple[int, ...] = LENGTH_BUCKETS,
    sampled: Sampling | None = None,
    pack_tokens: int = PACK_TOKENS,
    most_bytes: int = MOST_BYTES,
    progress: Callable[[int], object] = lambda tokens: None,
) -> dict[str, AcceptanceCounts]:
    """Return the acceptance of each of `drafts` on conversations `members` of a store, in the order of `members`.

    `window` is the attention window of the drafts that read taps. `edges` are those of `AcceptanceCounts`. `sampled` is
    counted on the same batches. `most_bytes` of host memory are used for reading ahead; a micro-batch that needs more
    is read alone. `progress` is called with the tokens of each micro-batch.
    """
    needs = BatchNeeds(steps=draft_tokens, window=window, teacher=sampled is not None, next_tokens=True)
    loader = BatchLoader(store, needs=needs, teacher=TeacherView() if sampled is None else sampled.teacher)
    parts = _micro_batches(members, store.index["tokens"][members].astype(np.int64), pack_tokens)
    counts = {name: AcceptanceCounts(draft_tokens=draft_tokens, edges=edges, members=len(members)) for name in drafts}
    places = np.full(len(store), -1, np.int64)
    places[members] = np.arange(len(members))
    largest = max((loader.most_bytes(part) for part in parts), default=0)
    data = Prefetcher(
        store, [loader], (Part(part, 1.0) for part in parts), [device], most_bytes=min(most_bytes, _AHEAD * largest)
    )
    with as_current(device), data:
        for part in parts:
            batch = data.next_batch()
            _count(counts, batch, drafts, sampled, places[part])
            progress(batch.tokens)
    return counts


@dataclass(frozen=True)
class Sampling:
    """What counts the acceptance of some drafts under speculative sampling, beside greedy figures."""

    teacher: TeacherView
    """The teacher over the vocabulary of these drafts."""
    overlaps: Mapping[str, Overlaps]
    counts: Mapping[str, SampledCounts]
    """By the names of `overlaps`; `measure` adds to them."""


def _micro_batches(members: NDArray[np.int64], tokens: NDArray[np.int64], limit: int) -> list[NDArray[np.int64]]:
    """Pack the conversations, some of like length at a time: the packing is quadratic in their number."""
    order = np.argsort(-tokens, kind="stable")
    groups = [order[first : first + _PACKED_AT_ONCE] for first in range(0, len(order), _PACKED_AT_ONCE)]
    return [part for group in groups for part in micro_batches(members[group], tokens[group], limit)]


def draft_hits(draft: Draft, frozen: FrozenWeights, store: StoreReader, *, draft_tokens: int, compute: str) -> Hits:
    """Return the hits of a draft, whose vocabulary is the one of its size that the store declares.

    `compute` is that of `Draft.proposer`. Raises InputError where the store has no such vocabulary.
    """
    device = frozen.embed_tokens.device
    target_ids = torch.from_numpy(store.vocab_map(draft.shape.draft_vocab_size).target_ids).to(device)
    propose = draft.proposer(frozen, compute)

    def hits(batch: Batch) -> Tensor:
        proposals = propose(batch, draft_tokens)
        return (target_ids[proposals.clamp(min=0)] == batch.argmax[batch.teacher_index]) & (proposals >= 0)

    return hits


def bigram_hits(table: NDArray[np.int64], device: torch.device) -> Hits:
    """Return the hits of a table from `bigram_table`."""
    successors = torch.from_numpy(table).to(device)
    return lambda batch: successors[batch.step_tokens] == batch.argmax[batch.teacher_index]


def measure_draft(
    draft: Draft,
    frozen: FrozenWeights,
    store: StoreReader,
    members: NDArray[np.int64],
    *,
    draft_tokens: int = 5,
    compute: str = "auto",
    pack_tokens: int = PACK_TOKENS,
    most_bytes: int = MOST_BYTES,
) -> AcceptanceCounts:
    """Return the acceptance of one draft; the arguments are those of `measure` and `draft_hits`."""
    hits = draft_hits(draft, frozen, store, draft_tokens=draft_tokens, compute=compute)
    found = measure(
        store,
        members,
        {"draft": hits},
        draft_tokens=draft_tokens,
        window=draft.shape.sliding_window,
        device=frozen.embed_tokens.device,
        pack_tokens=pack_tokens,
        most_bytes=most_bytes,
    )
    return found["draft"]


@torch.inference_mode()
def _count(
    counts: dict[str, AcceptanceCounts],
    batch: Batch,
    drafts: Mapping[str, Hits],
    sampled: Sampling | None,
    places: NDArray[np.int64],
) -> None:
    """Count a batch. `places` are the rows of its conversations in the counts. The host waits for the device once."""
    assert batch.next_tokens is not None, "the batch was asked for with them"
    overlaps = {} if sampled is None else {name: made(batch) for name, made in sampled.overlaps.items()}
    agreements = (batch.next_tokens == batch.argmax).sum()
    found = _to_host([agreements, batch.conversation, *(hits(batch) for hits in drafts.values()), *overlaps.values()])
    agreed, conversation, hits, bounds = int(found[0]), found[1], found[2 : 2 + len(drafts)], found[2 + len(drafts) :]
    starts, left = _turns(batch, conversation)
    for (name, item), hit in zip(counts.items(), hits, strict=True):
        assert name in drafts, "counts are in the order of the drafts"
        count_chain(item, starts, left, hit, places[conversation])
        item.conversations += batch.conversations
        item.teacher_positions += batch.argmax.shape[0]
        item.agreements += agreed
    for name, bound in zip(overlaps, bounds, strict=True):
        assert sampled is not None
        sampled.counts[name].add(left, bound, places[conversation])


def _to_host(tensors: list[Tensor]) -> list[NDArray[Any]]:
    """Return copies in host memory. On a GPU all are asked for before the first one is waited for."""
    copies = [value.to("cpu", non_blocking=True) for value in tensors]
    if tensors[0].is_cuda:
        torch.cuda.current_stream(tensors[0].device).synchronize()
    return [value.numpy() for value in copies]


def _turns(batch: Batch, conversation: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the start rows' positions in their conversations, and the tokens left of their turns, both [S] int64.

    `conversation` [S] is the batch's, on the host. Above the steps of a batch, `left` is only known to be one more, and
    that is all that counting needs.
    """
    positions = batch.host.key_positions[batch.host.start_index]
    follows = np.append(positions[1:] == positions[:-1] + 1, False)  # the next start row is one of the same turn
    left = 1 + np.where(follows, np.append(batch.host.steps[1:], 0), 0)
    shifts = np.array(batch.shifts, np.int64)[conversation]
    return positions - shifts, left.astype(np.int64)
