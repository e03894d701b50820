"""Training steps of fresh drafts, as `draftcache train` makes them, for `draftcache.tools.bench.train` to time."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.data.batches import Batch
from draftcache.draft_train.drafts.block.choose_pass import pass_settings as block_settings
from draftcache.draft_train.drafts.eagle3.choose_pass import pass_settings
from draftcache.draft_train.drafts.eagle3.fused_pass import FusedPass
from draftcache.draft_train.drafts.eagle3.model import Eagle3Model
from draftcache.draft_train.drafts.gradient_pass import GradientPass
from draftcache.draft_train.loss.objective import Objective
from draftcache.draft_train.optimizer import make_optimizer
from draftcache.draft_train.ranks import GradientSums, Ranks
from draftcache.tools.bench.capture import timed
from draftcache.tools.bench.parts.block_cases import BlockCase, block_pass, drawn_model
from draftcache.tools.bench.parts.train_cases import SHAPE


def optimizer_step(
    device: torch.device, ranks: Ranks | None = None, *, lean: bool = False, attention: str = "triton"
) -> Callable[[Batch], Any]:
    """Make a fresh draft and return a function that trains it by one batch; with `ranks`, by one batch of each rank."""
    with torch.device(device):
        model = Eagle3Model(SHAPE)
        embeddings = torch.randn(SHAPE.vocab_size, SHAPE.hidden_size, dtype=torch.bfloat16)
        target_ids = torch.arange(SHAPE.draft_vocab_size)
        in_draft = torch.arange(SHAPE.vocab_size) < SHAPE.draft_vocab_size
    config = TrainConfig(
        store=Path("synthetic"), output=Path("synthetic"), splits=("train",), recompute_mlp=lean, attention=attention
    )
    training = FusedPass(model, Objective(config, target_ids, in_draft), embeddings, pass_settings(config))
    return training_step(training, model, config, ranks)


def block_step(case: BlockCase, device: torch.device) -> Callable[[Batch], Any]:
    """Make a fresh block draft and return a function that trains it by one batch."""
    config, model = case.config(), drawn_model(case.shape(), device)
    return training_step(block_pass(model, config, block_settings(config)), model, config)


def training_step(
    training: GradientPass, model: torch.nn.Module, config: TrainConfig, ranks: Ranks | None = None
) -> Callable[[Batch], Any]:
    """Return a function that makes a batch's gradients, sums them over `ranks` where given, clips them and steps."""
    optimizer = make_optimizer(config, model)
    sums = None if ranks is None else GradientSums(model, ranks)

    def step(batch: Batch) -> Any:
        result = training(batch, sums.ready if sums else None)
        if sums:
            sums.finish()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return result

    return step


def timed_steps(step: Callable[[], Any], runs: int = 5) -> tuple[float, int]:
    """Return the median seconds of a step, and the most bytes that PyTorch held in the steps."""
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(timed(step) for _ in range(runs))
    return seconds, torch.cuda.max_memory_allocated()
