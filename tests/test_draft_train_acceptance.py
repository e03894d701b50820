"""Chain counting against a loop that plays the game token by token."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from draftcache.draft_train.acceptance import AcceptanceCounts, count_chain
from draftcache.draft_train.bigram import bigram_table
from draftcache.draft_train.measure import bigram_hits, measure
from draftcache.store.format.rows import start_rows, tokens_left
from draftcache.store.reader import StoreReader
from support.synthetic import DRAFT_VOCAB, turns, vocab_map, write_store


def play(mask: np.ndarray, hits: np.ndarray, draft_tokens: int) -> tuple[int, int]:
    """Serve every turn: (verify steps, tokens) by simulation over token positions."""
    by_row = dict(zip(start_rows(mask).tolist(), hits, strict=True))
    steps = tokens = 0
    position = 1
    while position < len(mask):
        opens = mask[position] and (position == 1 or not mask[position - 1])
        if not opens:
            position += 1
            continue
        newest = position  # the verifier has just written this token of the turn
        while newest + 1 < len(mask) and mask[newest + 1]:
            steps += 1
            row = newest - 1
            for k in range(draft_tokens + 1):
                newest += 1
                tokens += 1
                ended = newest + 1 >= len(mask) or not mask[newest + 1]
                if ended or k == draft_tokens or not by_row[row][k]:
                    break
        position = newest + 1
    return steps, tokens


@pytest.mark.parametrize("seed", range(30))
def test_chain_equals_simulation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random(200) < rng.choice([0.6, 0.9, 1.0])
    hits = rng.random((start_rows(mask).size, 5)) < rng.choice([0.0, 0.5, 0.9, 1.0])
    counts = AcceptanceCounts(draft_tokens=5)
    starts = start_rows(mask)
    left = tokens_left(mask, starts)
    count_chain(counts, starts, left, hits)
    assert (counts.verify_steps, counts.tokens) == play(mask, hits, 5)
    clipped = AcceptanceCounts(draft_tokens=5)
    count_chain(clipped, starts, np.minimum(left, 6), hits)
    assert clipped.to_json() == counts.to_json()


def test_known_chain() -> None:
    """Turn of 8 tokens; rows accept 2, then (after 3 tokens) 0, then everything that is left."""
    mask = turns(12, (2, 10))
    hits = np.zeros((start_rows(mask).size, 5), np.bool_)  # rows 1..7
    hits[0, :2] = True
    hits[4] = True
    counts = AcceptanceCounts(draft_tokens=5)
    count_chain(counts, start_rows(mask), tokens_left(mask, start_rows(mask)), hits)
    assert (counts.verify_steps, counts.tokens) == (3, 7)
    assert counts.proposals.tolist() == [3, 2, 2, 0, 0]
    assert counts.accepted.tolist() == [2, 2, 1, 0, 0]
    assert counts.acceptance_length == pytest.approx(7 / 3)


def test_product_of_means_is_not_the_acceptance_length() -> None:
    """Negative control for the usual shortcut: hits that come together are worth more than their averages say."""
    mask = turns(400, (1, 400))
    rows = start_rows(mask).size
    together = np.repeat(np.random.default_rng(0).random((rows, 1)) < 0.5, 5, axis=1)
    counts = AcceptanceCounts(draft_tokens=5)
    count_chain(counts, start_rows(mask), tokens_left(mask, start_rows(mask)), together)
    shortcut = 1 + sum(0.5**k for k in range(1, 6))
    assert counts.acceptance_length > shortcut + 0.3


def test_bigram_table_and_its_acceptance(tmp_path: Path) -> None:
    write_store(tmp_path)
    store = StoreReader(tmp_path)
    table = bigram_table(store, store.members("train"))
    pairs: dict[int, dict[int, int]] = {}
    for member in store.members("train"):
        item = store.read(int(member))
        tokens = item.arrays["token_ids"].astype(int)
        for j in range(1, len(tokens)):
            if item.loss_mask[j]:
                pairs.setdefault(tokens[j - 1], {}).setdefault(tokens[j], 0)
                pairs[tokens[j - 1]][tokens[j]] += 1
    for token, successors in pairs.items():
        assert table[token] == min(successors, key=lambda t: (-successors[t], t))
    assert (np.delete(table, list(pairs)) == -1).all()
    cpu = torch.device("cpu")
    drafts = {"bigram": bigram_hits(table, cpu)}
    counts = measure(store, store.members("val"), drafts, draft_tokens=5, window=16, device=cpu)["bigram"]
    assert counts.conversations == 4
    assert 1.0 <= counts.acceptance_length < 6.0
    assert counts.greedy_agreement < 0.5
    assert counts.to_json()["kind"].startswith("teacher-forced (")
    assert len(vocab_map()) == DRAFT_VOCAB


@pytest.mark.parametrize(
    ("agreements", "kind"),
    [
        (100_000, "exact"),
        (99_999, "teacher-forced (99.99 % greedy)"),
        (99_900, "teacher-forced (99.90 % greedy)"),
        (0, "teacher-forced (0.00 % greedy)"),
    ],
)
def test_only_text_that_is_greedy_at_all_positions_is_called_exact(agreements: int, kind: str) -> None:
    counts = AcceptanceCounts(draft_tokens=5, teacher_positions=100_000, agreements=agreements)
    assert (counts.kind, counts.to_json()["kind"]) == (kind, kind)
