"""AdamW over the float32 weights, and its learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from draftcache.draft_train.config import TrainConfig


def make_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.AdamW:
    """Return AdamW over the model's parameters, with weight decay for matrices and none for the norms' vectors."""
    groups = [
        {"params": [item for item in model.parameters() if item.ndim == 2], "weight_decay": config.weight_decay},
        {"params": [item for item in model.parameters() if item.ndim != 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(config: TrainConfig, step: int, total: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0, of `total` steps.

    It warms up linearly over `warmup_ratio` of the steps, then follows a cosine down to `final_lr_ratio` of its peak.
    """
    warmup = max(1, math.ceil(config.warmup_ratio * total))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    floor = config.final_lr_ratio
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
