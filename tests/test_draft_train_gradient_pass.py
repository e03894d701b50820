"""A gradient pass: gradients that accumulate, and parameters announced once, when they are complete."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from support.draft_batches import batches
from support.draft_models import embeddings, make_model
from support.gradient_passes import loss_of, objective, plain_pass


def test_gradients_accumulate_and_equal_autograd() -> None:
    model, together, apart = make_model(), *batches()
    loss = loss_of(objective(), model, embeddings(), together).loss
    expected = torch.autograd.grad(loss, list(model.parameters()))
    run = plain_pass(model, objective(), embeddings())
    for part in apart:
        run(replace(part, loss_share=together.loss_share))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient)


def test_every_parameter_is_announced_once_with_its_final_gradient() -> None:
    model, _, (batch, _) = make_model(), *batches()
    spare = nn.Parameter(torch.ones(3))
    model.register_parameter("spare", spare)
    seen: list[tuple[nn.Parameter, torch.Tensor]] = []

    def ready(parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            seen.append((parameter, parameter.grad.clone()))

    plain_pass(model, objective(loss_chunk=3), embeddings())(batch, ready)
    assert len(seen) == len(list(model.parameters()))
    assert {id(parameter) for parameter, _ in seen} == {id(parameter) for parameter in model.parameters()}
    assert all(torch.equal(parameter.grad, gradient) for parameter, gradient in seen if parameter.grad is not None)
    assert torch.equal({id(parameter): gradient for parameter, gradient in seen}[id(spare)], torch.zeros(3))
