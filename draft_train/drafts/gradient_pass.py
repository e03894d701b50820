"""Forward and backward pass of one batch: the part of an optimizer step that a device may do in its own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from draftcache.draft_train.data.batches import Batch
from draftcache.draft_train.loss.objective import ObjectiveResult

Ready = Callable[[list[nn.Parameter]], None]
"""Called with parameters whose gradients are complete."""


class GradientPass(Protocol):
    """What the trainer needs of a way to make gradients."""

    def __call__(self, batch: Batch, ready: Ready | None = None) -> ObjectiveResult:
        """Add the gradients of the batch's loss to every parameter's `.grad` (float32, created if None).

        `ready` is called with parameters whose gradients of this batch are complete, each exactly once, in the order
        they complete, on whichever thread completes them, with its current stream ordered behind their values.
        """


class PlainPass:
    """Autograd over a loss; on a GPU in bf16 by autocast, with float32 weights and gradients. Is a `GradientPass`."""

    def __init__(self, model: nn.Module, loss: Callable[[Batch], ObjectiveResult]) -> None:
        """`loss` runs the model's forward pass over a batch."""
        self.model = model
        self.loss = loss

    def __call__(self, batch: Batch, ready: Ready | None = None) -> ObjectiveResult:
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
            if result.loss.requires_grad:  # it does not where no row carries loss
                result.loss.backward()  # type: ignore[no-untyped-call]
        finally:
            for hook in hooks:
                hook.remove()
        for parameter in list(waiting):  # the loss does not depend on these
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            complete(parameter)
        return result
