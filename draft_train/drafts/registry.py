"""Draft architectures by name. The module of an architecture is imported when its name is first asked for."""

from __future__ import annotations

import importlib

from draftcache.draft_train.drafts.protocol import Architecture
from draftcache.store.common.errors import InputError

DEFAULT = "eagle3"
"""The architecture of checkpoints that name none, because they were written when there was only one."""

_BUILT_IN = {"eagle3": "draftcache.draft_train.drafts.eagle3.architecture"}
"""By name, the modules that define `ARCHITECTURE`."""
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
        register(importlib.import_module(_BUILT_IN[name]).ARCHITECTURE)
    return _registered[name]
