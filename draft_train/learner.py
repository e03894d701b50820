"""A draft while it is trained: gradients of micro-batches are added up, then the optimizer makes a step of them."""

from __future__ import annotations

import math

import torch

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.data.batches import Batch
from draftcache.draft_train.data.frozen import FrozenWeights
from draftcache.draft_train.drafts.protocol import Draft
from draftcache.draft_train.loss.objective import Objective, ObjectiveResult
from draftcache.draft_train.optimizer import make_optimizer
from draftcache.draft_train.ranks import GradientSums, Ranks
from draftcache.store.common.errors import InputError
from draftcache.store.format.vocab_map import VocabMap


class Learner:
    """A draft with its optimizer, its objective and its gradient pass.

    An optimizer step is `add` for each micro-batch, `close`, and `update`. Only `update` waits for the device, so that
    the steps of learners on different devices run at the same time if all of them are closed before one is updated.
    """

    def __init__(
        self, config: TrainConfig, draft: Draft, frozen: FrozenWeights, vocab_map: VocabMap, ranks: Ranks
    ) -> None:
        """`vocab_map` is the draft's vocabulary, whose head rows `frozen` holds."""
        self.ranks, self.device = ranks, ranks.device
        self.model = draft.model
        self.needs = draft.needs(config)
        self.optimizer = make_optimizer(config, self.model)
        self.objective = Objective(
            config,
            torch.from_numpy(vocab_map.target_ids).to(self.device),
            torch.from_numpy(vocab_map.padded(draft.shape.vocab_size).t2d).to(self.device),
            frozen.lm_head,
            frozen.head_form,
        )
        self.gradients = draft.gradient_pass(config, self.objective, frozen, say=ranks.leads)
        self.sums = GradientSums(self.model, ranks)
        self._max_grad_norm = config.max_grad_norm
        self._result = self._nothing()
        self._closed: torch.Tensor | None = None

    def _nothing(self) -> ObjectiveResult:
        return ObjectiveResult.zeros(self.needs.steps, self.device)

    def add(self, batch: Batch, *, last: bool) -> None:
        """Add the gradients of a micro-batch's loss. `last` says that no other one of the optimizer step follows."""
        ready = self.sums.ready if last and self.ranks.world > 1 else None
        self._result = self._result + self.gradients(batch, ready)

    def close(self, mine: list[float]) -> None:
        """Sum gradients and figures over the ranks and clip the gradients. `mine` are further values to be summed."""
        self.sums.finish()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._max_grad_norm)
        values = torch.tensor(mine, dtype=torch.float64)
        sums = self.ranks.add_up(torch.cat((values.to(self.device), self._result.packed())))
        self._closed = torch.cat((norm.double()[None], sums))
        self._result = self._nothing()

    def update(self, rate: float, step: int, extra: int) -> tuple[float, list[float], list[float]]:
        """Make the optimizer step `step`, counted from 0, with learning rate `rate`, and drop the gradients.

        Returns the gradient norm, the sums of `close`'s `extra` further values, and `ObjectiveResult.packed()` as a
        list. Raises InputError, on every rank and before any weight changes, where loss or gradient is not finite.
        """
        assert self._closed is not None, "a step is closed before it is made"
        norm, *values = self._closed.tolist()  # the step's only wait for the device
        sums, figures = values[:extra], values[extra:]
        if not math.isfinite(figures[0]) or not math.isfinite(norm):
            raise InputError(
                f"step {step}: expected a finite loss and gradient, found loss {figures[0]}, norm {norm}; "
                "lower --learning-rate, or verify the store"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, sums, figures
