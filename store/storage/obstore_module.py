"""The obstore library, loaded in a way that also works in forked processes."""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from draftcache.store.common.errors import InputError

TRIES = 3
"""How often a whole call is tried. obstore tries each request of a call again by itself."""
PART = 8 << 20
"""Bytes of one ranged read and of one uploaded part. S3 allows 10,000 parts, which makes files of up to 84 GB."""

_left_behind: list[Any] = []
"""Modules and clients that a fork copied. They are never freed: that would close the parent's connections."""
_module: ModuleType | None = None
_module_lock = threading.Lock()
_inherited = False
"""Whether this process was forked from one that had loaded obstore."""
_on_fork: list[Callable[[], list[Any]]] = []


def load_obstore(url: str) -> ModuleType:
    """Return the obstore module that works in this process.

    Raises InputError, which names `url`, where obstore is not installed.
    """
    global _module
    with _module_lock:
        if _module is None:
            try:
                _module = _second_copy() if _inherited else importlib.import_module("obstore")
                importlib.import_module("obstore.store")
            except ModuleNotFoundError as exc:
                raise InputError(f"{url}: object stores need obstore: pip install 'draftcache[objects]'") from exc
        return _module


def when_forked(forget: Callable[[], list[Any]]) -> None:
    """Have every forked child call `forget`, which gives up its inherited clients and returns them."""
    _on_fork.append(forget)


def _second_copy() -> ModuleType:
    """Load a second copy of obstore, with a new runtime, in a process forked from one that had loaded it.

    obstore has one pool of I/O threads for the whole process. A fork copies the pool's state but not its threads, so
    that every call in the child would wait forever, with new clients too. The library loaded a second time, from
    another file, starts a new pool, which takes 10-20 ms and 6 MiB (measured with obstore 0.12.1).
    """
    old = importlib.import_module("obstore")
    # The loaded native module's path would not do: in the child of a child that module is a copy, whose file is gone.
    native = next(Path(old.__path__[0]).glob("_obstore*.so"))
    for name in [name for name in sys.modules if name == "obstore" or name.startswith("obstore.")]:
        _left_behind.append(sys.modules.pop(name))
    with tempfile.TemporaryDirectory() as directory:
        copy = shutil.copy(native, directory)
        spec = importlib.util.spec_from_file_location("obstore._obstore", copy)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["obstore._obstore"] = module
        spec.loader.exec_module(module)
    return importlib.import_module("obstore")


def _after_fork() -> None:
    """Reset this module in the child, which keeps the inherited clients but never uses them."""
    global _module, _module_lock, _inherited
    _inherited = "obstore" in sys.modules
    _module, _module_lock = None, threading.Lock()
    for forget in _on_fork:
        _left_behind.extend(forget())


os.register_at_fork(after_in_child=_after_fork)


def brief(error: BaseException) -> str:
    """Return an error's text without obstore's dump of its inner values, at most 500 characters."""
    text = " ".join(str(error).partition("Debug source:")[0].split())
    return f"{type(error).__name__}: {text[:500]}"


def is_final(error: Exception) -> bool:
    """Return whether trying again can't help: a missing permission, missing credentials, or a wrong set-up."""
    names = ("PermissionDeniedError", "UnauthenticatedError", "InvalidPathError", "UnknownConfigurationKeyError")
    return type(error).__name__ in (*names, "NotSupportedError", "TypeError", "ValueError")
