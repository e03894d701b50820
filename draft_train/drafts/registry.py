"""Draft architectures by name. An architecture's module is imported when its name is asked for."""

from __future__ import annotations

import importlib

from draftcache.draft_train.drafts.protocol import Architecture
from draftcache.store.common.errors import InputError

DEFAULT = "eagle3"
"""The architecture of checkpoints that name none: they were written before there was a second one."""

_BUILT_IN = {"eagle3": "draftcache.draft_train.drafts.eagle3.architecture"}
"""Modules that define `ARCHITECTURE`."""
_registered: dict[str, Architecture] = {}


def register(architecture: Architecture) -> None:
    """Make an architecture known to this process under its name, in place of any that has the name already."""
    _registered[architecture.name] = architecture


def architecture_names() -> list[str]:
    """Every name that `find_architecture` knows."""
    return sorted({*_BUILT_IN, *_registered})


def find_architecture(name: str) -> Architecture:
    """The architecture of this name. Raises InputError naming those there are."""
    if name not in _registered:
        if name not in _BUILT_IN:
            raise InputError(f"--draft: expected one of {architecture_names()}, found {name!r}")
        register(importlib.import_module(_BUILT_IN[name]).ARCHITECTURE)
    return _registered[name]
