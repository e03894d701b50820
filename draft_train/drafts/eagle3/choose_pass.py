"""Chooses the gradient pass of an Eagle3 draft, and its settings."""

from __future__ import annotations

import torch

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.drafts.eagle3.fused_forward import FusedForward
from draftcache.draft_train.drafts.eagle3.fused_pass import FusedPass
from draftcache.draft_train.drafts.eagle3.fused_state import FusedPassSettings
from draftcache.draft_train.drafts.eagle3.kernels.flash_attention import why_not_flash
from draftcache.draft_train.drafts.eagle3.model import Eagle3Model
from draftcache.draft_train.drafts.pass_support import require_plain, say_plain, why_no_kernels
from draftcache.draft_train.loss.objective import Objective
from draftcache.store.common.errors import InputError

_LEAN_ROWS = 4096
"""Most rows of a slice where memory is to be spared."""
_MLP_SLICES = 4
"""Slices of the head that make one slice of the MLP, whose rows take that much less memory."""


def choose_pass(
    config: TrainConfig, model: Eagle3Model, objective: Objective, embeddings: torch.Tensor, *, say: bool = True
) -> FusedPass | None:
    """Return the fused pass if --compute asks for it or, with auto, if it can run; None for the plain pass.

    `say` prints why the plain pass runs on a GPU. Raises InputError where --compute fused, --recompute-mlp or
    --attention flash can't be honoured.
    """
    reason = why_not_fused(config, model, embeddings.device)
    if reason is None and config.compute != "plain":
        if config.attention == "flash" and (missing := why_not_flash(model.shape.head_dim, embeddings.device)):
            raise InputError(f"--attention flash: expected FlashAttention 4 to run, found {missing}")
        return FusedPass(model, objective, embeddings, pass_settings(config))
    require_plain(config, reason or "--compute plain")
    if say and reason is not None and embeddings.is_cuda:
        say_plain(reason)
    return None


def pass_settings(config: TrainConfig) -> FusedPassSettings:
    """Return the settings of the fused pass. If memory is to be spared, slices are smaller too."""
    lean = config.recompute_mlp
    rows = min(_LEAN_ROWS, config.loss_chunk) if lean else config.loss_chunk
    return FusedPassSettings(
        rows=rows,
        mlp_rows=rows if lean else rows * _MLP_SLICES,
        recompute_mlp=lean,
        flash_attention=config.attention == "flash",
    )


def choose_forward(model: Eagle3Model, embeddings: torch.Tensor, compute: str) -> FusedForward | None:
    """Return the fused forward pass, of which nothing is kept; None for the plain one.

    `compute` is that of `Draft.proposer`. Raises InputError where "fused" can't be honoured.
    """
    reason = why_no_kernels(model.shape.head_dim, embeddings.device)
    if compute == "fused" and reason is not None:
        raise InputError(f"--compute fused: expected the fused pass, found {reason}")
    if compute == "plain" or reason is not None:
        return None
    return FusedForward(model, embeddings, FusedPassSettings(recompute_mlp=True))


def why_not_fused(config: TrainConfig, model: Eagle3Model, device: torch.device) -> str | None:
    """Return the reason why the fused pass can't run; None if it can."""
    reason = why_no_kernels(model.shape.head_dim, device)
    if reason is None and config.loss_rows != "turns":
        return f"--loss-rows {config.loss_rows}: its rows may unroll past the end of their turn"
    if reason is None and config.step_weights != "decay":
        return f"--step-weights {config.step_weights}: the weights of a step depend on later ones"
    return reason
