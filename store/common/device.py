"""The choice of a torch device by name, for every command that takes `--device`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from draftcache.store.common.errors import InputError


def as_current(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which a GPU is the current device, on which Triton starts kernels; a CPU needs none."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def choose_device(name: str) -> torch.device:
    """Return the device called `name`: "cpu", "cuda", "cuda:N", or "auto", which is the GPU where there is one.

    Raises InputError for another name, and for a GPU that this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device: expected cpu, cuda, cuda:N or auto, found {name!r}")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise InputError(f"--device {name}: expected one of this machine's GPUs, found {count} in all")
    return device


def use_device(name: str) -> torch.device:
    """Return `choose_device(name)`. A GPU becomes the calling thread's current device.

    Triton starts kernels on the current device, and a stream without a device is that device's.
    """
    device = choose_device(name)
    if device.type == "cuda" and device.index is not None:  # without a number it is the current one
        torch.cuda.set_device(device)
    return device
