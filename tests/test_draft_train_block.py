"""The plain pass of block drafts against a draft that runs slot by slot, and what it must not depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from draftcache.draft_train.data.batches import Batch
from draftcache.draft_train.drafts.block.architecture import BlockDraft
from draftcache.draft_train.drafts.block.forward import block_outputs
from draftcache.draft_train.drafts.block.model import BlockModel
from draftcache.draft_train.drafts.block.shape import BlockShape
from draftcache.store.common.errors import InputError
from draftcache.store.format.array_spec import tap_name
from draftcache.store.format.rows import rows_in_reach
from draftcache.store.format.schema import Conversation
from draftcache.tools.decoding.block_cache import BlockCache
from support.block_models import MASK_TOKEN, SHAPES, WINDOW, batch_of, conversations, make_model, make_shape
from support.draft_models import embeddings
from support.gradient_passes import near, objective, run
from support.synthetic import LAYERS

EVERY = pytest.mark.parametrize("shape", [make_shape(**changes) for changes in SHAPES.values()], ids=SHAPES)


def outputs(model: BlockModel, batch: Batch, steps: int) -> torch.Tensor:
    """The outputs [S, steps, H] of all start rows; 0 past a row's steps."""
    found = torch.zeros(batch.start_index.shape[0], steps, model.shape.hidden_size, dtype=torch.float64)
    for output in block_outputs(model, embeddings(), batch, steps):
        found[output.rows, output.number] = output.hidden
    return found


def slot_by_slot(model: BlockModel, items: list[Conversation], batch: Batch, steps: int) -> torch.Tensor:
    """What `outputs` returns, by the cache that decoding uses, one conversation after the other."""
    found = torch.zeros(batch.start_index.shape[0], steps, model.shape.hidden_size, dtype=torch.float64)
    starts = batch.key_positions[batch.start_index] - torch.tensor(batch.shifts)[batch.conversation]
    for row, (start, number) in enumerate(zip(starts.tolist(), batch.conversation.tolist(), strict=True)):
        arrays = items[number].arrays
        taps = torch.cat([torch.from_numpy(arrays[tap_name(layer)]) for layer in LAYERS], dim=-1)
        tokens = arrays["token_ids"][: start + 2].astype(np.int64).tolist()
        states = BlockCache(model, embeddings()).states(taps, tokens, steps)
        live = int(batch.steps[row])
        found[row, :live] = torch.stack(states)[:live]
    return found


@EVERY
@torch.no_grad()
def test_blocks_are_those_of_decoding_slot_by_slot(shape: BlockShape) -> None:
    model, items = make_model(shape), conversations()
    batch = batch_of(shape, items)
    found, expected = outputs(model, batch, shape.steps), slot_by_slot(model, items, batch, shape.steps)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "change",
    [
        lambda shape: {"window": shape.window - 1},
        lambda shape: {"causal": tuple(not causal for causal in shape.causal)},
        lambda shape: {"mask_token_id": 3},
        lambda shape: {"bonus_anchor": not shape.bonus_anchor},
        lambda shape: {"rope_theta": 9_000.0},
    ],
    ids=["window", "causal", "mask token", "anchor", "rotary base"],
)
@torch.no_grad()
def test_a_shape_that_differs_in_one_thing_would_be_noticed(change: Callable[[BlockShape], dict[str, Any]]) -> None:
    """The negative controls of the test above."""
    shape = make_shape(markov_rank=3)
    model, batch = make_model(shape), batch_of(shape, conversations())
    found = outputs(model, batch, 3)
    model.shape = replace(shape, **change(shape))
    for layer in model.each_layer():
        layer.self_attn.shape = model.shape
    assert float((outputs(model, batch, 3) - found).abs().max()) > 1e-3


@EVERY
def test_packs_give_the_gradients_of_their_conversations(shape: BlockShape) -> None:
    items = conversations()
    packed, apart = gradients(shape, [items]), gradients(shape, [[item] for item in items])
    assert near(packed, apart, 1e-9)


def gradients(shape: BlockShape, groups: list[list[Conversation]], **settings: object) -> dict[str, torch.Tensor]:
    """The sums of the gradients of batches, by parameter."""
    model = make_model(shape)
    total: dict[str, torch.Tensor] = {}
    for items in groups:
        batch = replace(batch_of(shape, items), loss_share=0.5)
        for name, value in run(pass_of(model, **settings), model, batch)[1].items():
            total[name] = total.get(name, torch.zeros(())) + value
    return total


def pass_of(model: BlockModel, **settings: object) -> Any:
    """The plain pass of a draft under these settings."""
    draft = BlockDraft("dspark", model.shape, model)
    made = objective(**{"draft": "dspark", "ttt_steps": 0, "block_size": model.shape.block_size} | settings)
    frozen: Any = type("Frozen", (), {"embed_tokens": embeddings()})
    return draft.plain_pass(made.config, made, frozen)


def test_rows_out_of_reach_change_nothing_and_rows_in_reach_do() -> None:
    shape = make_shape(markov_rank=3)
    whole = gradients(shape, [conversations()])

    def pruned(window: int) -> dict[str, torch.Tensor]:
        items = conversations()
        for item in items:
            kept = rows_in_reach(item.loss_mask, window)
            for name in ("positions", *map(tap_name, LAYERS)):
                item.arrays[name] = item.arrays[name][kept]
        return gradients(shape, [items])

    # Slot 0 of a block is one position behind its start row, so a window of W reaches W - 2 rows back from there.
    assert near(pruned(WINDOW - 1), whole, 1e-9)
    assert not near(pruned(WINDOW - 2), whole, 1e-3)


def test_d_pace_weighs_a_step_by_what_is_expected_from_there_on() -> None:
    shape = make_shape(markov_rank=3)
    model, batch = make_model(shape), batch_of(shape, conversations())
    made = objective(draft="dspark", ttt_steps=0, block_size=shape.block_size, step_weights="d-pace")
    losses = torch.zeros(batch.step_tokens.shape, dtype=torch.float64)
    weights, realised = losses.clone(), losses.clone()
    draft_ids = {int(token): number for number, token in enumerate(made.target_ids)}
    with torch.no_grad():
        for output in block_outputs(model, embeddings(), batch, shape.steps):
            for row, hidden in zip(output.rows.tolist(), output.hidden, strict=True):
                place = int(batch.teacher_index[row, output.number])
                logits = model.logits(hidden[None], batch.step_tokens[row, output.number][None])
                losses[row, output.number] = made.row_losses(logits, batch, torch.tensor([place]))[0][0]
                assert batch.next_tokens is not None
                token = draft_ids.get(int(batch.next_tokens[place]))
                realised[row, output.number] = 0.0 if token is None else logits.softmax(-1)[0, token]
    total = torch.zeros((), dtype=torch.float64)
    rows_of_step = [(batch.steps > step) for step in range(shape.steps)]
    for row in range(len(losses)):
        live = int(batch.steps[row])
        for step in range(live):
            product, weight = 1.0, 0.0
            for later in range(live):
                product *= 0.5 + 0.5 * float(realised[row, later])
                weight += product if later >= step else 0.0
            same = batch.conversation == batch.conversation[row]
            count = int((rows_of_step[step] & same).sum())
            place = int(batch.teacher_index[row, step])
            mass = float(torch.exp(batch.log_z_draft[place] - batch.log_z_full[place]))
            total += losses[row, step] * weight * mass / count * batch.loss_share
            weights[row, step] = weight
    found = pass_of(model, step_weights="d-pace")(batch)
    assert float(found.loss.detach()) == pytest.approx(float(total), rel=1e-5)
    assert float(weights.max()) > 1.5 * float(weights[weights > 0].min())


def test_the_confidence_head_learns_acceptance_and_nothing_else_learns_from_it() -> None:
    with_head, without = (
        gradients(make_shape(markov_rank=3, confidence_head=confident), [conversations()])
        for confident in (True, False)
    )
    own = {name: value for name, value in with_head.items() if name.startswith("confidence_head")}
    assert set(with_head) - set(without) == set(own)
    assert all(float(value.abs().max()) > 0 for value in own.values())
    model = make_model(make_shape(markov_rank=3, confidence_head=True))
    plain = make_model(make_shape(markov_rank=3))
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    batch = batch_of(model.shape, conversations())
    _, found = run(pass_of(model), model, batch)
    _, expected = run(pass_of(plain), plain, batch)
    assert near(found, expected, 1e-9)
    own = found.keys() - expected.keys()
    assert own == {"confidence_head.proj.weight", "confidence_head.proj.bias"}
    assert all(float(found[name].abs().max()) > 0 for name in own)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ("sliding",)}, "--layer-types: expected one of"),
        ({"layer_types": ("sliding", "wide")}, "--layer-types: expected one of"),
        ({"window": None}, "--sliding-window: expected a window for the sliding layers"),
        ({"mask_token_id": MASK_TOKEN + 1}, "--mask-token-id: expected one of the verifier's 40 ids"),
        ({"block_size": 1, "bonus_anchor": True}, "--block-size: expected 2 slots or more"),
        ({"num_attention_heads": 3}, "expected attention heads in groups of the 2 key-value heads"),
        ({"head_dim": 5}, "expected an even head_dim"),
        ({"num_hidden_layers": 0}, "expected num_hidden_layers above 0"),
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_shape(**changes)
