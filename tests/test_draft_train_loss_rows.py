"""The unshifted loss mask against the shifting that defines it, its loss by hand, and what training says of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from draftcache.draft_train.data.batches import build_batch
from draftcache.draft_train.data.loss_rows import left_out_pairs, turn_rows, unshifted_rows
from draftcache.draft_train.drafts.eagle3.unroll import unroll
from draftcache.draft_train.loss.objective import Objective, teacher_probabilities
from draftcache.draft_train.loss.tail_bucket import tail_bucket_loss
from draftcache.draft_train.trainer import Trainer
from draftcache.store.common.errors import InputError
from draftcache.store.format.rows import teacher_positions
from draftcache.store.reader import StoreReader
from support.draft_models import embeddings, make_model
from support.gradient_passes import loss_of, objective, plain_pass
from support.synthetic import conversation, manifest, turns, vocab_map, write_store
from support.training_runs import config

STEPS = 4
MASKS = [
    turns(30, (5, 25)),
    turns(20, (3, 6), (9, 19)),
    turns(24, (1, 9), (11, 15), (16, 24)),  # from the first token on; short gaps; up to the end
    turns(12, (2, 5)),  # one position in all
]


def by_shifting(mask: NDArray[np.bool_]) -> set[tuple[int, int]]:
    """The pairs that carry loss when the mask is moved one place to the left at every step, stored or not."""
    pairs = set()
    moved = np.append(mask[:-1], False)
    for step in range(STEPS):
        pairs |= {(int(row), step) for row in np.flatnonzero(moved)}
        moved = np.append(moved[1:], False)
    return pairs


@pytest.mark.parametrize("mask", MASKS)
def test_unshifted_rows_are_those_of_the_mask_that_moves(mask: NDArray[np.bool_]) -> None:
    stored = set(teacher_positions(mask).tolist())
    expected = {(row, step) for row, step in by_shifting(mask) if row + 1 + step in stored}
    found = unshifted_rows(mask, STEPS)
    assert {
        (int(found.starts[row]), int(step)) for row, step in zip(*np.nonzero(found.carries), strict=True)
    } == expected
    assert (found.carries.any(1)).all()
    last = [max(np.flatnonzero(row)) for row in found.carries]
    assert found.steps.tolist() == [step + 1 for step in last]
    ours = turn_rows(mask, STEPS)
    pairs = {(int(ours.starts[row]), int(step)) for row, step in zip(*np.nonzero(ours.carries), strict=True)}
    assert pairs - expected  # each has what the other lacks
    assert expected - pairs or mask.sum() < 5


def test_the_second_token_of_a_turn_is_never_predicted() -> None:
    mask = turns(30, (5, 25))
    for rule, first in ((turn_rows, 6), (unshifted_rows, 7)):
        rows = rule(mask, STEPS)
        predicted = (rows.starts[:, None] + 2 + np.arange(STEPS))[rows.carries]
        assert (predicted.min(), predicted.max()) == (first, 24)
        assert rows.starts.min() == {6: 4, 7: 2}[first]  # rows before the turn, which no draft starts from


def test_loss_by_hand() -> None:
    rng = np.random.default_rng(0)
    items = [conversation(rng, mask) for mask in MASKS[:3]]
    batch = build_batch(items, manifest().codec, max_steps=STEPS, window=7, loss_rows="unshifted")
    model, inside = make_model(), torch.from_numpy(vocab_map().t2d)
    expected = 0.0
    for step in unroll(model, embeddings(), batch, STEPS):
        for row, hidden in zip(step.rows.tolist(), step.hidden, strict=True):
            place = int(batch.teacher_index[row, step.number])
            if place >= 0 and inside[batch.argmax[place]]:
                p, tau = teacher_probabilities(batch.teacher_logits[place][None], batch.log_z_draft[place][None])
                loss = tail_bucket_loss(model.logits(hidden[None]), batch.teacher_ids[place][None], p, tau)
                expected += 0.8**step.number * float(loss.detach()) / (3 * 30)  # the longest has 30 tokens
    found = loss_of(objective(loss_rows="unshifted", out_of_vocab="drop"), model, embeddings(), batch)
    assert float(found.loss.detach()) == pytest.approx(expected, rel=1e-6)
    carries = (batch.teacher_index >= 0) & (torch.arange(STEPS) < batch.steps[:, None])
    assert found.rows.tolist() == carries.sum(0).tolist()
    assert not carries[:, 0].all()


def test_conversations_without_such_rows_give_no_gradient() -> None:
    item = conversation(np.random.default_rng(0), turns(12, (3, 5)))
    batch = build_batch([item], manifest().codec, max_steps=STEPS, window=7, loss_rows="unshifted")
    assert batch.start_index.numel() == 0
    model, mapping = make_model(), vocab_map()
    made = Objective(config(Path()), torch.from_numpy(mapping.target_ids), torch.from_numpy(mapping.t2d))
    result = plain_pass(model, made, embeddings())(batch)
    assert float(result.loss) == float(result.rows.sum()) == 0
    assert all(float(parameter.grad.abs().sum()) == 0 for parameter in model.parameters() if parameter.grad is not None)


def test_training_says_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_store(tmp_path / "store")
    store = StoreReader(tmp_path / "store")
    members = store.members("train")
    mask = turns(40, (6, 16), (22, 37))
    wanted = by_shifting(mask)
    stored = set(teacher_positions(mask).tolist())
    left = [pair for pair in wanted if sum(pair) + 1 not in stored]
    assert left_out_pairs(store, members, STEPS) == (4 * len(left), 4 * len(wanted))
    trainer = Trainer(config(tmp_path, loss_rows="unshifted", out_of_vocab="drop", ttt_steps=STEPS))
    trainer.run()
    assert f"no teacher is stored for {4 * len(left)} of its {4 * len(wanted)} pairs" in capsys.readouterr().err
    with pytest.raises(InputError, match="--loss-rows: expected one of"):
        Trainer(config(tmp_path, loss_rows="shifted"))
