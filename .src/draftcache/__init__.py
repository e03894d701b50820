"""Train draft models for speculative decoding from stored verifier outputs, with no verifier in memory.

This module is the public Python API: one call per command, and the dataclasses that hold their settings. Everything
else may move between versions. Nothing heavy is imported before a name is used.

    prepare(PrepareConfig(...))     conversations -> token ids and loss masks
    generate(GenerateConfig(...))   prompts -> the verifier's own answers, as rows for prepare
    capture(CaptureConfig(...))     prepared dataset and verifier -> store
    open_store(location)            random access to a store's conversations
    verify_store(location)          whether every byte of a store is what was committed
    train(TrainConfig(...))         store -> checkpoints
    evaluate(...)                   store and checkpoint -> acceptance lengths
    export(...)                     checkpoint -> what an inference engine loads

In the repository, this folder is how the top-level folders become one importable package: `draftcache.capture`,
`draftcache.store`, `draftcache.draft_train` and `draftcache.tools` are links to them.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from draftcache.capture.generate.config import GenerateConfig
    from draftcache.capture.generate.job import generate
    from draftcache.capture.job.config import CaptureConfig
    from draftcache.capture.job.launch import capture
    from draftcache.capture.prepare.chat.settings import ChatSettings
    from draftcache.capture.prepare.job import PrepareConfig, prepare
    from draftcache.draft_train.config import TrainConfig
    from draftcache.draft_train.evaluate import evaluate
    from draftcache.draft_train.export import export
    from draftcache.draft_train.trainer import train
    from draftcache.store.common.errors import DraftcacheError
    from draftcache.store.reader import open_store
    from draftcache.store.verify import verify_store

__version__ = "0.1.0"

__all__ = [
    "CaptureConfig",
    "ChatSettings",
    "DraftcacheError",
    "GenerateConfig",
    "PrepareConfig",
    "TrainConfig",
    "__version__",
    "capture",
    "evaluate",
    "export",
    "generate",
    "open_store",
    "prepare",
    "train",
    "verify_store",
]

_HOMES = {
    "CaptureConfig": "draftcache.capture.job.config",
    "ChatSettings": "draftcache.capture.prepare.chat.settings",
    "DraftcacheError": "draftcache.store.common.errors",
    "GenerateConfig": "draftcache.capture.generate.config",
    "PrepareConfig": "draftcache.capture.prepare.job",
    "TrainConfig": "draftcache.draft_train.config",
    "evaluate": "draftcache.draft_train.evaluate",
    "export": "draftcache.draft_train.export",
    "generate": "draftcache.capture.generate.job",
    "open_store": "draftcache.store.reader",
    "prepare": "draftcache.capture.prepare.job",
    "train": "draftcache.draft_train.trainer",
    "verify_store": "draftcache.store.verify",
}
"""The module of each public name, which is imported when the name is first used."""


def __getattr__(name: str) -> Any:
    if name == "capture":  # a package that can be called
        return importlib.import_module("draftcache.capture")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
