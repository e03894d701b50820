"""Order of training: pure, complete, the same for any number of ranks; packing within its limit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from draftcache.draft_train.data.order import Schedule, epoch_batches, micro_batches, share_of_rank

MEMBERS = np.arange(5, 103)
TOKENS = np.random.default_rng(0).integers(10, 1000, 200)


def batches(order: str, seed: int = 1, epoch: int = 2, size: int = 8) -> list[list[int]]:
    found = epoch_batches(MEMBERS, TOKENS[MEMBERS], order=order, seed=seed, epoch=epoch, size=size)
    return [batch.tolist() for batch in found]


@pytest.mark.parametrize("order", ["shuffle", "bucketed"])
def test_order_is_a_pure_function_of_seed_and_epoch(order: str) -> None:
    assert batches(order) == batches(order)
    assert batches(order) != batches(order, epoch=3)
    assert batches(order) != batches(order, seed=2)
    assert sorted(number for batch in batches(order) for number in batch) == MEMBERS.tolist()
    assert sorted(map(len, batches(order))) == [2] + [8] * 12


def test_bucketed_steps_hold_like_lengths_and_shuffled_ones_do_not() -> None:
    spreads = {order: np.mean([np.ptp(TOKENS[batch]) for batch in batches(order)]) for order in ("shuffle", "bucketed")}
    assert spreads["bucketed"] < 0.2 * spreads["shuffle"]
    means = [float(TOKENS[batch].mean()) for batch in batches("bucketed")]
    assert means != sorted(means)


def schedule(**changes: object) -> Schedule:
    values: dict[str, object] = {
        "members": MEMBERS, "tokens": TOKENS, "order": "shuffle", "seed": 1, "epochs": 3, "batch_conversations": 8,
        "pack_tokens": 1500,
    }  # fmt: skip
    return Schedule(**values | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["shuffle", "bucketed"])
@pytest.mark.parametrize("world", [2, 3, 8])
def test_any_number_of_ranks_shares_the_same_steps(order: str, world: int) -> None:
    whole = list(schedule(order=order).steps())
    ranks = [list(schedule(order=order, rank=rank, world=world).steps()) for rank in range(world)]
    assert len(whole) == schedule().total_steps == 39
    for step, plan in enumerate(whole):
        assert all(np.array_equal(rank[step].conversations, plan.conversations) for rank in ranks)
        taken = [int(number) for rank in ranks for part in rank[step].parts for number in part]
        assert sorted(taken) == sorted(plan.conversations.tolist())
    if world == 8:
        assert any(not plan.parts for rank in ranks for plan in rank)


def test_ranks_have_about_as_many_tokens_in_every_step() -> None:
    """The negative control is every n-th conversation, in the order in which the step has them."""
    waits = {"shared": 0.0, "in turn": 0.0}
    for chosen in np.split(np.random.default_rng(3).permutation(160), 10):
        tokens = TOKENS[chosen]
        shared = [share_of_rank(chosen, tokens, rank, 4) for rank in range(4)]
        assert sorted(np.concatenate(shared).tolist()) == sorted(chosen.tolist())
        for name, parts in (("shared", shared), ("in turn", [chosen[rank::4] for rank in range(4)])):
            loads = [int(TOKENS[part].sum()) for part in parts]
            waits[name] += sum(max(loads) - load for load in loads) / (4 * max(loads))
    assert waits["shared"] < 0.2 * waits["in turn"]
    alone = [share_of_rank(MEMBERS[:5], TOKENS[MEMBERS[:5]], rank, 8) for rank in range(8)]
    assert sorted(map(len, alone)) == [0, 0, 0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("first", [0, 1, 12, 13, 20, 38, 39])
def test_a_later_first_step_is_the_rest_of_the_whole(first: int) -> None:
    whole, rest = list(schedule(order="bucketed").steps()), list(schedule(order="bucketed").steps(first))
    assert len(rest) == len(whole) - first
    for mine, theirs in zip(rest, whole[first:], strict=True):
        assert np.array_equal(mine.conversations, theirs.conversations)


def test_micro_batches_keep_to_the_limit_and_hold_everything_once() -> None:
    for limit in (1, 500, 1500, 10**6):
        parts = micro_batches(MEMBERS, TOKENS[MEMBERS], limit)
        assert sorted(int(number) for part in parts for number in part) == MEMBERS.tolist()
        assert all(len(part) == 1 or TOKENS[part].sum() <= limit for part in parts)
    assert len(micro_batches(MEMBERS, TOKENS[MEMBERS], 0)) == len(MEMBERS)
    assert len(micro_batches(MEMBERS, TOKENS[MEMBERS], 10**6)) == 1
    assert len(micro_batches(MEMBERS, TOKENS[MEMBERS], 1500)) < 1.1 * TOKENS[MEMBERS].sum() / 1500 + 1
    assert micro_batches(MEMBERS[:0], TOKENS[:0], 10) == []


def test_plans_do_not_depend_on_packing() -> None:
    packed, single = schedule(), replace(schedule(), pack_tokens=0)
    for mine, theirs in zip(packed.steps(), single.steps(), strict=True):
        assert np.array_equal(mine.conversations, theirs.conversations)
        assert len(mine.parts) < len(theirs.parts) or len(theirs.parts) == 1
