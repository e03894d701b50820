"""The JSON of draftcache's own files, parsed without surprises.

Python's parser accepts NaN and infinities, which are no JSON and can't be written again; numbers too large for a float
become infinite; lone surrogates become text that can't be encoded; and very deep nesting ends in a RecursionError. All
of these raise ValueError here.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn


def parse_json(data: str | bytes) -> Any:
    """Return the value of a JSON text (bytes: UTF-8). Raises ValueError, whose message says what is wrong."""
    text = data if isinstance(data, str) else data.decode("utf-8")
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except RecursionError as exc:
        raise ValueError("it is nested too deeply") from exc
    if "\\u" in text:  # only an escape can bring a lone surrogate
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as exc:
            raise ValueError(f"it holds the lone surrogate U+{ord(exc.object[exc.start]):04X}") from exc
        except RecursionError as exc:
            raise ValueError("it is nested too deeply") from exc
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:40]} is too large")
    return number
