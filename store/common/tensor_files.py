"""Safetensors files that everybody can read whom the umask lets read new files.

The library writes a temporary file of mode 0600 and renames it, so that another user of a shared disk, such as the
account that serves a draft, could not read it. All of the project's safetensors are written here.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from pathlib import Path
from stat import S_IMODE
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

if TYPE_CHECKING:
    import torch


def save_tensors(
    path: Path,
    tensors: Mapping[str, np.ndarray] | Mapping[str, torch.Tensor],
    metadata: dict[str, str] | None = None,
) -> None:
    """Write contiguous tensors to a safetensors file, with the mode that the umask gives to new files.

    The tensors are numpy arrays or torch's, all of one kind. An existing file is replaced. The file is not made
    durable: `atomic_path` and `atomic_directory` do that.
    """
    mode = _mode_of_new_files(path.parent)
    values: dict[str, Any] = dict(tensors)
    if all(isinstance(value, np.ndarray) for value in values.values()):
        save_file(values, path, metadata=metadata)
    else:
        from safetensors.torch import save_file as save_torch_file  # here, because a store's readers need no torch

        save_torch_file(values, path, metadata=metadata)
    path.chmod(mode)


def _mode_of_new_files(directory: Path) -> int:
    """Return the permission bits of a new file in this directory, by creating one.

    The umask itself can only be read by changing it, which other threads that create files would notice.
    """
    probe = directory / f".{secrets.token_hex(8)}.partial"
    probe.touch()
    try:
        return S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink()
