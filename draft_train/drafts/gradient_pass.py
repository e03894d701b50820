"""Gradient passes: forward and backward pass of one batch, of which a device may need its own implementation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from draftcache.draft_train.data.batches import Batch
from draftcache.draft_train.loss.objective import ObjectiveResult

GradientHook = Callable[[list[nn.Parameter]], None]
"""A function that is called with parameters whose gradients are complete."""


class GradientPass(Protocol):
    """A way to compute gradients, as the trainer calls it."""

    def __call__(self, batch: Batch, ready: GradientHook | None = None) -> ObjectiveResult:
        """Add the gradients of the batch's loss to every parameter's `.grad` (float32, created if None).

        `ready` is called with parameters whose gradients are complete for this batch: once for each parameter, in the
        order of completion, on the thread that completes them, whose current stream is ordered after their values.
        """


class PlainPass:
    """Autograd over a loss. Implements `GradientPass`. On a GPU it runs in bf16 autocast, with float32 weights and
    gradients.
    """

    def __init__(self, model: nn.Module, loss: Callable[[Batch], ObjectiveResult]) -> None:
        """`loss` runs the forward pass of `model` over a batch."""
        self.model = model
        self.loss = loss

    def __call__(self, batch: Batch, ready: GradientHook | None = None) -> ObjectiveResult:
        device = batch.taps.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            result = self.loss(batch)
        waiting = dict.fromkeys(self.model.parameters())

        def complete(parameter: torch.Tensor) -> None:
            assert isinstance(parameter, nn.Parameter)
            del waiting[parameter]
            if ready is not None:
                ready([parameter])

        hooks = [
            parameter.register_post_accumulate_grad_hook(complete)  # type: ignore[no-untyped-call]
            for parameter in waiting
        ]
        try:
            if result.loss.requires_grad:  # it does not if no row carries loss
                result.loss.backward()  # type: ignore[no-untyped-call]
        finally:
            for hook in hooks:
                hook.remove()
        for parameter in list(waiting):  # parameters that the loss does not depend on
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            complete(parameter)
        return result
