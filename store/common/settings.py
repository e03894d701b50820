"""Checks that every dataclass of settings shares, whether its values come from flags or from Python."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

from draftcache.store.common.errors import InputError


def require_finite(settings: Any) -> None:
    """Raise InputError, which names the flag, where a field of a dataclass of settings is infinite or not a number."""
    for item in fields(settings):
        value = getattr(settings, item.name)
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{item.name.replace('_', '-')}: expected a finite number, found {value}")
