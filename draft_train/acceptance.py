"""Offline acceptance: how many tokens per verify step a served draft would win, computed from the store alone.

With greedy verification, a chain that starts at row t is accepted while the draft's argmax equals the verifier's. In
conversations that the verifier itself wrote greedily, the realised tokens are its argmaxes. The teacher-forced steps
are then the served steps up to the first mismatch: accepted lengths n(t) are exact, and walking `t -> t + n(t) + 1`
counts the verify steps that serving makes. On other text, even where a single token differs, the figure is
teacher-forced, which serves for comparison and predicts nothing. A verifier argmax outside the draft vocabulary counts
as a rejection, never as a missing value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from draftcache.draft_train.data.batches import Batch, build_batch
from draftcache.draft_train.data.frozen import FrozenWeights
from draftcache.draft_train.drafts.protocol import Draft
from draftcache.store.format.rows import start_rows, tokens_left
from draftcache.store.format.schema import Conversation
from draftcache.store.reader import StoreReader

LENGTH_BUCKETS = (16_384, 32_768, 65_536)
"""Positions that separate the buckets of `by_position`."""


@dataclass
class AcceptanceCounts:
    """Counts, summed over conversations. The ratios of them are properties."""

    draft_tokens: int
    conversations: int = 0
    verify_steps: int = 0
    tokens: int = 0
    """Tokens that the verify steps produced: all tokens of each turn but its first."""
    proposals: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[draft_tokens], by k: verify steps whose first k draft tokens were accepted and whose turn goes on."""
    accepted: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """[draft_tokens], by k: the verify steps of `proposals` whose next draft token was accepted too."""
    bucket_steps: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(LENGTH_BUCKETS) + 1, np.int64))
    """Verify steps by the bucket of the position where they start. `bucket_tokens` are the tokens of these steps."""
    bucket_tokens: NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(LENGTH_BUCKETS) + 1, np.int64))
    teacher_positions: int = 0
    agreements: int = 0
    """Teacher positions whose realised token is the verifier's argmax."""

    def __post_init__(self) -> None:
        if self.proposals.size == 0:
            self.proposals = np.zeros(self.draft_tokens, np.int64)
            self.accepted = np.zeros(self.draft_tokens, np.int64)

    @property
    def acceptance_length(self) -> float:
        """Tokens per verify step along the chain, the token of the verifier included; 1 means no gain."""
        return self.tokens / max(1, self.verify_steps)

    @property
    def conditional(self) -> list[float]:
        """Acceptance rate of each draft token along the chain, given that the draft tokens before it were accepted."""
        return [float(hit) / max(1, int(tried)) for hit, tried in zip(self.accepted, self.proposals, strict=True)]

    @property
    def greedy_agreement(self) -> float:
        """Share of realised tokens that are the verifier's argmax; 1 on text that it wrote greedily."""
        return self.agreements / max(1, self.teacher_positions)

    @property
    def kind(self) -> str:
        """Exact where every realised token is the verifier's argmax; otherwise teacher-forced, with their share.

        A single other token means that the counts past it are not those of serving this verifier.
        """
        if self.agreements == self.teacher_positions:
            return "exact"
        # Rounded down, so that 100 % is never said of less.
        return f"teacher-forced ({math.floor(self.greedy_agreement * 10_000) / 100:.2f} % greedy)"

    def to_json(self) -> dict[str, Any]:
        """Return the figures for reports. `kind` says whether they are exact, or how far the text is from greedy."""
        edges = ["0", *map(str, LENGTH_BUCKETS), "inf"]
        return {
            "acceptance_length": self.acceptance_length,
            "conditional_acceptance": self.conditional,
            "verify_steps": self.verify_steps,
            "tokens": self.tokens,
            "conversations": self.conversations,
            "draft_tokens": self.draft_tokens,
            "greedy_agreement": self.greedy_agreement,
            "kind": self.kind,
            "by_position": {
                f"{edges[number]}-{edges[number + 1]}": float(tokens) / int(steps)
                for number, (steps, tokens) in enumerate(zip(self.bucket_steps, self.bucket_tokens, strict=True))
                if steps
            },
        }


def count_chain(counts: AcceptanceCounts, loss_mask: NDArray[np.bool_], hits: NDArray[np.bool_]) -> None:
    """Walk the verify steps of every turn of one conversation, and add them to `counts`.

    `loss_mask` [L] bool. `hits` [S, draft_tokens] bool says for each start row and step k whether the draft's argmax
    equals the verifier's. Draft tokens beyond the end of the turn are not counted.
    """
    starts = start_rows(loss_mask)
    left = tokens_left(loss_mask, starts)
    usable = np.arange(counts.draft_tokens)[None, :] < left[:, None]
    accepted = np.cumprod(hits & usable, axis=1).sum(axis=1)
    number = 0
    while number < starts.size:
        taken = int(accepted[number])
        gained = min(taken + 1, int(left[number]))
        tried = min(taken + 1, counts.draft_tokens, int(left[number]))
        counts.verify_steps += 1
        counts.tokens += gained
        counts.proposals[:tried] += 1
        counts.accepted[:taken] += 1
        bucket = int(np.searchsorted(LENGTH_BUCKETS, starts[number], side="right"))
        counts.bucket_steps[bucket] += 1
        counts.bucket_tokens[bucket] += gained
        # Start rows of one turn are consecutive, and the first start row of the next turn follows them.
        number += gained
    counts.conversations += 1


def _agreements(item: Conversation) -> tuple[int, int]:
    """Return the number of teacher positions, and of those whose realised token is the verifier's argmax."""
    positions = item.arrays["teacher_positions"].astype(np.int64)
    realised = item.arrays["token_ids"][positions + 1]
    return positions.size, int((realised == item.arrays["argmax"]).sum())


HitFunction = Callable[[Conversation, Batch], NDArray[np.bool_]]
"""Returns the `hits` of `count_chain` for a conversation and the batch made of it."""


def _measure(
    store: StoreReader,
    members: NDArray[np.int64],
    draft_tokens: int,
    window: int | None,
    hits_of: HitFunction,
) -> AcceptanceCounts:
    counts = AcceptanceCounts(draft_tokens=draft_tokens)
    names = [name for name in store.specs if name not in store.manifest.teacher_form.entry_specs()]
    for number in members:
        item = store.read(int(number), names, decode=False)
        batch = build_batch([item], store.codec, max_steps=draft_tokens, window=window)
        count_chain(counts, item.loss_mask, hits_of(item, batch))
        positions, agreements = _agreements(item)
        counts.teacher_positions += positions
        counts.agreements += agreements
    return counts


@torch.inference_mode()
def measure_acceptance(
    draft: Draft,
    frozen: FrozenWeights,
    store: StoreReader,
    members: NDArray[np.int64],
    *,
    draft_tokens: int = 5,
) -> AcceptanceCounts:
    """Return the acceptance of a draft on conversations `members` of a store, at `draft_tokens` per verify step.

    The draft's vocabulary is the one of its size that the store declares. Raises InputError where there is none.
    """
    device = frozen.embed_tokens.device
    target_ids = torch.from_numpy(store.vocab_map(draft.shape.draft_vocab_size).target_ids).to(device)

    def hits_of(_item: Conversation, batch: Batch) -> NDArray[np.bool_]:
        batch = batch.to(device)
        proposals = draft.propose(frozen, batch, draft_tokens)
        hits = (target_ids[proposals.clamp(min=0)] == batch.argmax[batch.teacher_index]) & (proposals >= 0)
        return np.asarray(hits.cpu().numpy())

    return _measure(store, members, draft_tokens, draft.shape.sliding_window, hits_of)


def bigram_table(store: StoreReader, members: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return [V] int64: each token's most frequent successor written by the assistant; -1 if it has none.

    Among equally frequent successors the lowest id wins.
    """
    vocab = int(store.manifest.verifier["vocab_size"])
    pairs = []
    for number in members:
        item = store.read(int(number), ["token_ids", "loss_mask"])
        tokens = item.arrays["token_ids"].astype(np.int64)
        written = item.loss_mask[1:]
        pairs.append(tokens[:-1][written] * vocab + tokens[1:][written])
    keys, counts = np.unique(np.concatenate(pairs), return_counts=True)
    order = np.lexsort((keys, -counts))
    previous, successor = keys[order] // vocab, keys[order] % vocab
    seen, first_rows = np.unique(previous, return_index=True)
    table = np.full(vocab, -1, np.int64)
    table[seen] = successor[first_rows]
    return table


def measure_bigram(
    table: NDArray[np.int64], store: StoreReader, members: NDArray[np.int64], *, draft_tokens: int = 5
) -> AcceptanceCounts:
    """Return the acceptance of a table from `bigram_table` used as the draft: a baseline that needs no training."""

    def hits_of(_item: Conversation, batch: Batch) -> NDArray[np.bool_]:
        proposed = torch.from_numpy(table)[batch.step_tokens]
        return np.asarray((proposed == batch.argmax[batch.teacher_index]).numpy())

    return _measure(store, members, draft_tokens, store.manifest.window, hits_of)
