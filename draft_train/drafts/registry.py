"""Draft architectures by name. The module of an architecture is imported when its name is first asked for."""

from __future__ import annotations

import importlib

from draftcache.draft_train.drafts.protocol import Architecture
from draftcache.store.common.errors import InputError

DEFAULT = "eagle3"
"""The architecture of checkpoints that name none, because they were written when there was only one."""

_BUILT_IN = {
    "eagle3": ("draftcache.draft_train.drafts.eagle3.architecture", "ARCHITECTURE"),
    "dflash": ("draftcache.draft_train.drafts.block.architecture", "DFLASH"),
    "dspark": ("draftcache.draft_train.drafts.block.architecture", "DSPARK"),
}
"""By name, the module of an architecture and its name there."""
_registered: dict[str, Architecture] = {}


def register(architecture: Architecture) -> None:
    """Make an architecture known to this process under its name. It replaces an earlier one of the same name."""
    _registered[architecture.name] = architecture


def architecture_names() -> list[str]:
    """Return all names that `find_architecture` knows, sorted."""
    return sorted({*_BUILT_IN, *_registered})


def find_architecture(name: str) -> Architecture:
    """Return the architecture of this name. Raises InputError, which names all architectures, where there is none."""
    if name not in _registered:
        if name not in _BUILT_IN:
            raise InputError(f"--draft: expected one of {architecture_names()}, found {name!r}")
        module, attribute = _BUILT_IN[name]
        register(getattr(importlib.import_module(module), attribute))
    return _registered[name]
