"""Conversations -> prepared dataset -> store. The package itself may be called: `draftcache.capture(config)`.

The public API's call and this package have one name, and importing any module of the package makes the package the
attribute `draftcache.capture`. So the module is callable, and both meanings hold whatever was imported before.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from draftcache.capture.job.config import CaptureConfig
    from draftcache.capture.job.progress import CaptureSummary


class _CallablePackage(ModuleType):
    def __call__(self, config: CaptureConfig) -> CaptureSummary:
        """Run a capture job, as `draftcache.capture.job.launch.capture` does."""
        from draftcache.capture.job.launch import capture

        return capture(config)


sys.modules[__name__].__class__ = _CallablePackage
