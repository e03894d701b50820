"""Chooses the gradient pass of a block draft, and its settings."""

from __future__ import annotations

import torch

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.drafts.block.fused_forward import BlockForward, BlockSettings
from draftcache.draft_train.drafts.block.fused_pass import BlockPass
from draftcache.draft_train.drafts.block.model import BlockModel
from draftcache.draft_train.drafts.pass_support import require_plain, say_plain, why_no_kernels
from draftcache.draft_train.loss.objective import Objective
from draftcache.store.common.errors import InputError

_LEAN_ROWS = 4096
"""Most rows of a slice where memory is to be spared."""


def choose_pass(
    config: TrainConfig, model: BlockModel, objective: Objective, embeddings: torch.Tensor, *, say: bool = True
) -> BlockPass | None:
    """Return the fused pass if --compute asks for it or, with auto, if it can run; None for the plain pass.

    `say` prints why the plain pass runs on a GPU. Raises InputError where --compute fused or --recompute-mlp can't be
    honoured.
    """
    reason = why_no_kernels(model.shape.head_dim, embeddings.device)
    if reason is None and config.loss_rows != "turns":
        reason = f"--loss-rows {config.loss_rows}: not every row of a block carries loss up to its end"
    if reason is None and config.compute != "plain":
        return BlockPass(model, objective, embeddings, pass_settings(config))
    require_plain(config, reason or "--compute plain")
    if say and reason is not None and embeddings.is_cuda:
        say_plain(reason)
    return None


def pass_settings(config: TrainConfig) -> BlockSettings:
    """Return the settings of the fused pass. If memory is to be spared, slices are smaller too."""
    if config.recompute_mlp:
        rows = min(_LEAN_ROWS, config.loss_chunk)
        return BlockSettings(slot_rows=2 * rows, rows=rows, recompute_mlp=True)
    return BlockSettings(rows=config.loss_chunk)


def choose_forward(model: BlockModel, embeddings: torch.Tensor, compute: str) -> BlockForward | None:
    """Return the fused forward pass, of which nothing is kept; None for the plain one.

    `compute` is that of `Draft.proposer`. Raises InputError where "fused" can't be honoured.
    """
    reason = why_no_kernels(model.shape.head_dim, embeddings.device)
    if compute == "fused" and reason is not None:
        raise InputError(f"--compute fused: expected the fused pass, found {reason}")
    return None if compute == "plain" or reason is not None else BlockForward(model, embeddings)
