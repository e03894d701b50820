"""The choice of a torch device by name, for every command that takes `--device`."""

from __future__ import annotations

import torch


def choose_device(name: str) -> torch.device:
    """Return the device called `name`: "cpu", "cuda", "cuda:N", or "auto", which is the GPU where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)
