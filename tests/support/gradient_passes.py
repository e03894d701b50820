"""Objectives over the synthetic vocabulary, and the gradients that a pass leaves in the tiny draft."""

from __future__ import annotations

from pathlib import Path

import torch

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.data.batches import Batch
from draftcache.draft_train.drafts.eagle3.fused_state import FusedPassSettings
from draftcache.draft_train.drafts.eagle3.model import Eagle3Model
from draftcache.draft_train.drafts.eagle3.unroll import unroll
from draftcache.draft_train.drafts.gradient_pass import GradientPass, PlainPass
from draftcache.draft_train.loss.objective import Objective, ObjectiveResult
from support.draft_models import STEPS
from support.synthetic import vocab_map

SMALL = FusedPassSettings(rows=7, mlp_rows=5)
"""Slices of the fused pass that divide no batch evenly."""


def config(**changes: object) -> TrainConfig:
    """Return settings of a run whose store and output do not exist: only what shapes a step is read."""
    values = {"store": Path("s"), "output": Path("o"), "splits": ("train",), "ttt_steps": STEPS}
    return TrainConfig(**values | changes)  # type: ignore[arg-type]


def objective(**changes: object) -> Objective:
    """Make the objective of `config(**changes)` over the synthetic draft vocabulary, on the CPU."""
    words = vocab_map()
    return Objective(config(**changes), torch.from_numpy(words.target_ids), torch.from_numpy(words.t2d))


def loss_of(made: Objective, model: Eagle3Model, table: torch.Tensor, batch: Batch) -> ObjectiveResult:
    """The objective's result for a model's plain unroll over a batch; `table` [VOCAB, HIDDEN] are its embeddings."""
    outputs = unroll(model, table, batch, batch.step_tokens.shape[1])
    return made(outputs, lambda output: model.logits(output.hidden), batch)


def plain_pass(model: Eagle3Model, made: Objective, table: torch.Tensor) -> PlainPass:
    """Autograd over the plain unroll of a model."""
    return PlainPass(model, lambda batch: loss_of(made, model, table, batch))


def run(training: GradientPass, model: Eagle3Model, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the packed result and a copy of every parameter's gradient by name; the gradients are then cleared."""
    result = training(batch).packed()
    found = {}
    for name, value in model.named_parameters():
        assert value.grad is not None
        found[name] = value.grad.clone()
    model.zero_grad(set_to_none=True)
    return result, found


def near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], bound: float = 1e-6) -> bool:
    """Say whether every tensor is within `bound` of the expected one of its name, relative in the 2-norm."""
    return all(float((found[name] - value).norm()) <= bound * float(value.norm()) for name, value in expected.items())
