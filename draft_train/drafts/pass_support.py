"""What fused passes need of a device, and what is refused where they can't run."""

from __future__ import annotations

import sys

import torch

from draftcache.draft_train.config import TrainConfig
from draftcache.store.common.errors import InputError
from draftcache.store.common.triton_launch import tl


def why_no_kernels(head_dim: int, device: torch.device) -> str | None:
    """Return the reason why the kernels of attention can't run with heads of this width; None if they can."""
    if device.type != "cuda":
        return f"device {device}: its kernels need a GPU"
    if tl is None:
        return "no triton; install it, it comes with torch on Linux"
    if head_dim & (head_dim - 1) or not 16 <= head_dim <= 256:
        return f"--head-dim {head_dim}: its kernels need a power of two from 16 to 256"
    return None


def require_plain(config: TrainConfig, found: str) -> None:
    """Raise InputError if the settings ask for a fused pass by name, where `found` says why there is none."""
    needing = {
        "--compute fused": config.compute == "fused",
        "--recompute-mlp": config.recompute_mlp,
        "--attention flash": config.attention == "flash",
    }
    if asked := next((flag for flag, given in needing.items() if given), None):
        raise InputError(f"{asked}: expected a fused pass, found {found}")


def say_plain(reason: str) -> None:
    """Print that the plain pass runs on a GPU."""
    print(f"draftcache train: the plain pass runs, several times slower, because of {reason}", file=sys.stderr)
