"""The fused pass of block drafts against autograd over the plain one: values, gradients, order and slices."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from draftcache.draft_train.drafts.block.architecture import BlockDraft
from draftcache.draft_train.drafts.block.fused_forward import BlockForward, BlockSettings
from draftcache.draft_train.drafts.block.fused_pass import BlockPass
from draftcache.draft_train.drafts.block.model import BlockModel
from draftcache.draft_train.drafts.gradient_pass import PlainPass
from draftcache.draft_train.loss.objective import Objective
from support.block_models import SHAPES, batch_of, conversations, make_model, make_shape
from support.draft_models import embeddings
from support.gradient_passes import near, objective, run

SMALL = BlockSettings(slot_rows=13, rows=7)
"""Slices that divide no batch evenly."""


def made(model: BlockModel, **settings: object) -> Objective:
    return objective(**{"draft": "dspark", "ttt_steps": 0, "block_size": model.shape.block_size} | settings)


def plain(model: BlockModel, **settings: object) -> PlainPass:
    """Autograd over the plain forward pass."""
    frozen: Any = type("Frozen", (), {"embed_tokens": embeddings()})
    own = made(model, **settings)
    return BlockDraft("dspark", model.shape, model).plain_pass(own.config, own, frozen)


def fused(model: BlockModel, settings: BlockSettings = SMALL, **changes: object) -> BlockPass:
    """The fused pass in float64."""
    return BlockPass(model, made(model, **changes), embeddings(), settings, dtype=torch.float64)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("loss", ["ce-l1", "tail-kl"])
def test_values_and_gradients_are_those_of_autograd(name: str, loss: str) -> None:
    model = make_model(make_shape(**SHAPES[name]))
    batch = batch_of(model.shape, conversations())
    expected = run(plain(model, loss=loss), model, batch)
    for settings in (BlockSettings(), SMALL, BlockSettings(slot_rows=9, rows=7, recompute_mlp=True)):
        found = run(fused(model, settings, loss=loss), model, batch)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
        assert near(found[1], expected[1])


def test_a_gradient_that_lacks_a_slice_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control of the test above."""
    model = make_model(make_shape(markov_rank=3))
    batch = batch_of(model.shape, conversations())
    expected = run(plain(model), model, batch)
    whole = BlockPass._slices
    monkeypatch.setattr(BlockPass, "_slices", lambda *given: list(whole(*given))[1:])
    assert not near(run(fused(model), model, batch)[1], expected[1], 1e-3)


@pytest.mark.parametrize("settings", [{"step_weights": "d-pace"}, {"out_of_vocab": "drop"}, {"loss": "ce"}], ids=str)
def test_other_objectives_too(settings: dict[str, Any]) -> None:
    model = make_model(make_shape(markov_rank=3))
    batch = batch_of(model.shape, conversations())
    expected, found = (run(make(model, **settings), model, batch) for make in (plain, fused))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=1e-6)
    assert near(found[1], expected[1])


def test_gradients_of_several_batches_add_up() -> None:
    model, items = make_model(make_shape(markov_rank=3)), conversations()
    training, batches = fused(model), [batch_of(model.shape, [item]) for item in items]
    apart = [run(training, model, batch)[1] for batch in batches]
    training(batches[0])
    together = run(training, model, batches[1])[1]
    assert near(together, {name: value + apart[1][name] for name, value in apart[0].items()}, 1e-9)


def test_every_parameter_is_ready_once_and_complete() -> None:
    model = make_model(make_shape(**SHAPES["everything trained"]))
    batch, training = batch_of(model.shape, conversations()), fused(model)
    names = {id(value): name for name, value in model.named_parameters()}
    said: dict[str, tuple[torch.Tensor, int]] = {}

    def ready(values: list[torch.nn.Parameter]) -> None:
        for value in values:
            assert names[id(value)] not in said
            assert value.grad is not None
            said[names[id(value)]] = value.grad.clone(), value.grad._version

    training(batch, ready)
    assert said.keys() == set(names.values())
    for name, value in model.named_parameters():
        assert value.grad is not None
        assert torch.equal(said[name][0], value.grad), name
        # Not even zeros are added: ranks may be summing it. Matrices share buffers, and these count all writes to them.
        assert value.ndim == 2 or said[name][1] == value.grad._version, name
    assert list(said).index("lm_head.weight") < list(said).index("layers.1.mlp.down_proj.weight")
    assert list(said).index("layers.1.mlp.down_proj.weight") < list(said).index("layers.0.mlp.down_proj.weight")


@pytest.mark.parametrize("name", SHAPES)
def test_choices_of_an_evaluation_are_the_plain_ones(name: str) -> None:
    model = make_model(make_shape(**SHAPES[name]))
    batch = batch_of(model.shape, conversations())
    frozen: Any = type("Frozen", (), {"embed_tokens": embeddings()})
    draft = BlockDraft("dspark", model.shape, model)
    expected = {
        (part.number, int(row)): logits
        for part in draft.step_logits(frozen, batch, model.shape.steps)
        for row, logits in zip(part.rows, part.logits, strict=True)
    }
    forward = BlockForward(model, embeddings(), SMALL, dtype=torch.float64)
    found = {
        (part.number, int(row)): logits
        for part in forward.step_logits(batch, model.shape.steps)
        for row, logits in zip(part.rows, part.logits, strict=True)
    }
    assert found.keys() == expected.keys()
    for key, logits in expected.items():
        torch.testing.assert_close(found[key], logits, rtol=1e-6, atol=1e-6)
