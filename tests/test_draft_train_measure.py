"""Evaluation at scale: packed, read ahead and in slices, it counts what one conversation after the other counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from draftcache.draft_train import bigram
from draftcache.draft_train.acceptance import AcceptanceCounts, count_chain
from draftcache.draft_train.bigram import bigram_table
from draftcache.draft_train.data.batches import build_batch
from draftcache.draft_train.data.frozen import FrozenWeights
from draftcache.draft_train.drafts import protocol
from draftcache.draft_train.drafts.eagle3.architecture import ARCHITECTURE, Eagle3Draft
from draftcache.draft_train.drafts.eagle3.fused_forward import FusedForward
from draftcache.draft_train.drafts.eagle3.fused_state import FusedPassSettings
from draftcache.draft_train.drafts.sizes import VerifierShape
from draftcache.draft_train.measure import _turns, draft_hits, measure, measure_draft
from draftcache.store.common.errors import InputError
from draftcache.store.format.rows import start_rows, tokens_left
from draftcache.store.reader import StoreReader
from support.synthetic import write_store
from support.training_runs import config

CPU = torch.device("cpu")
TOKENS = 3


@pytest.fixture
def store(tmp_path: Path) -> StoreReader:
    write_store(tmp_path / "store", per_shard=6)
    return StoreReader(tmp_path / "store")


@pytest.fixture
def draft(store: StoreReader, tmp_path: Path) -> Eagle3Draft:
    """A draft that hits now and then: its head is so large that its choices are far apart."""
    shape = ARCHITECTURE.shape_for(config(tmp_path), VerifierShape.of(store, 0))
    made = ARCHITECTURE.build(shape, CPU)
    made.initialize(0, FrozenWeights.load(store, CPU), "verifier")
    return made


def by_hand(store: StoreReader, draft: Eagle3Draft, members: np.ndarray) -> AcceptanceCounts:
    """Measure one conversation after the other, from its masks, and agreements from its tokens."""
    frozen = FrozenWeights.load(store, CPU)
    counts = AcceptanceCounts(draft_tokens=TOKENS)
    target_ids = torch.from_numpy(store.vocab_map().target_ids)
    for number in members:
        item = store.read(int(number), decode=False)
        batch = build_batch([item], store.codec, max_steps=TOKENS, window=draft.shape.sliding_window)
        proposals = draft.propose(frozen, batch, TOKENS)
        hits = (target_ids[proposals.clamp(min=0)] == batch.argmax[batch.teacher_index]) & (proposals >= 0)
        starts = start_rows(item.loss_mask)
        count_chain(counts, starts, tokens_left(item.loss_mask, starts), hits.numpy())
        positions = item.arrays["teacher_positions"].astype(np.int64)
        counts.agreements += int((item.arrays["token_ids"][positions + 1] == item.arrays["argmax"]).sum())
        counts.teacher_positions += positions.size
        counts.conversations += 1
    return counts


@pytest.mark.parametrize("pack_tokens", [0, 90, 10_000])
def test_packs_count_what_conversations_count(
    store: StoreReader, draft: Eagle3Draft, monkeypatch: pytest.MonkeyPatch, pack_tokens: int
) -> None:
    monkeypatch.setattr(protocol, "LOGIT_ROWS", 7)
    members = store.members("train")
    expected = by_hand(store, draft, members).to_json()
    found = measure_draft(
        draft, FrozenWeights.load(store, CPU), store, members, draft_tokens=TOKENS, pack_tokens=pack_tokens
    )
    assert found.to_json() == expected
    assert expected["acceptance_length"] > 1.0
    assert 0 < expected["greedy_agreement"] < 1


def test_of_a_turn_no_more_than_is_left_is_counted(store: StoreReader, draft: Eagle3Draft) -> None:
    """The negative control of the positions and lengths that counting takes from a pack."""
    items = [store.read(number, decode=False) for number in (0, 1, 2)]
    batch = build_batch(items, store.codec, max_steps=TOKENS, window=16)
    starts, left = _turns(batch, batch.conversation.numpy())
    expected = [start_rows(item.loss_mask) for item in items]
    np.testing.assert_array_equal(starts, np.concatenate(expected))
    lefts = np.concatenate([tokens_left(item.loss_mask, rows) for item, rows in zip(items, expected, strict=True)])
    np.testing.assert_array_equal(left, np.minimum(lefts, TOKENS + 1))
    assert (left > TOKENS).any()
    assert (left == 1).any()


def test_entries_of_the_teacher_are_not_read(
    store: StoreReader, draft: Eagle3Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[str] = set()
    read = StoreReader.read

    def spying(self: StoreReader, number: int, names: object = None, **more: object) -> object:
        asked.update(names)  # type: ignore[arg-type]
        return read(self, number, names, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(StoreReader, "read", spying)
    measure_draft(draft, FrozenWeights.load(store, CPU), store, store.members("val"), draft_tokens=TOKENS)
    assert "argmax" in asked
    assert not {"teacher_ids", "teacher_gaps", "teacher_max"} & asked


def test_every_conversation_is_read_once_for_all_drafts(
    store: StoreReader, draft: Eagle3Draft, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen, numbers = FrozenWeights.load(store, CPU), []
    read = StoreReader.read

    def counting(self: StoreReader, number: int, *more: object, **named: object) -> object:
        if named.get("out") is not None:  # the taps, nearly all of its bytes
            numbers.append(number)
        return read(self, number, *more, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(StoreReader, "read", counting)
    hits = draft_hits(draft, frozen, store, draft_tokens=TOKENS, compute="plain")
    members = store.members("train")
    found = measure(store, members, {"one": hits, "two": hits}, draft_tokens=TOKENS, window=16, device=CPU)
    assert sorted(numbers) == sorted(members.tolist())
    assert found["one"].to_json() == found["two"].to_json()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_fused_forward_proposes_what_the_plain_one_does(
    store: StoreReader, draft: Eagle3Draft, dtype: torch.dtype
) -> None:
    frozen = FrozenWeights.load(store, CPU)
    draft.model.to(dtype)
    table = frozen.embed_tokens.to(dtype)
    frozen = FrozenWeights(**{**vars(frozen), "embed_tokens": table})
    items = [store.read(number, decode=False) for number in (0, 1, 2)]
    batch = build_batch(items, store.codec, max_steps=TOKENS, window=16)
    fused = FusedForward(draft.model, table, FusedPassSettings(rows=7, mlp_rows=5, recompute_mlp=True), dtype)
    expected = draft.propose(frozen, batch, TOKENS)
    assert torch.equal(fused.propose(batch, TOKENS), expected)
    assert (expected == -1).any()
    assert len(expected.unique()) > 5
    with torch.no_grad():
        draft.model.midlayer.mlp.down_proj.weight.add_(1.0)
    assert not torch.equal(fused.propose(batch, TOKENS), expected)  # it reads the weights as they are now


def test_what_can_not_run_is_refused(store: StoreReader, draft: Eagle3Draft) -> None:
    frozen = FrozenWeights.load(store, CPU)
    with pytest.raises(InputError, match="--compute fused: expected the fused pass, found device cpu"):
        draft.proposer(frozen, "fused")


def test_pairs_are_counted_alike_in_any_number_of_pieces(store: StoreReader, monkeypatch: pytest.MonkeyPatch) -> None:
    members = store.members("train")
    whole = bigram_table(store, members)
    monkeypatch.setattr(bigram, "_PAIRS", 10)
    np.testing.assert_array_equal(bigram_table(store, members), whole)
    assert (whole >= 0).sum() > 10
    assert bigram_table(store, members[:0]).max() == -1
