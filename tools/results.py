"""A command's result on stdout: text for people, or with --json exactly one JSON object and nothing else."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import Any, TextIO

_stdout: ContextVar[TextIO | None] = ContextVar("stdout of the command's result", default=None)


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add the flag --json, which `show` and `stdout_for_result` obey."""
    parser.add_argument(
        "--json", action="store_true", help="print the result as one JSON object; all else goes to stderr"
    )


@contextmanager
def stdout_for_result(*, as_json: bool) -> Iterator[None]:
    """With `as_json`, keep stdout for `show`: what else is printed meanwhile, by libraries too, goes to stderr."""
    if not as_json:
        yield
        return
    token = _stdout.set(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _stdout.reset(token)


def show(arguments: argparse.Namespace, values: Mapping[str, Any], text: str) -> None:
    """Print the result of a command that has done its work: `values` as JSON where --json was given, else `text`.

    Call it once, at the end: a command that fails prints nothing on stdout.
    """
    if not arguments.json:
        print(text, flush=True)
        return
    print(json.dumps(_plain(values), indent=2, allow_nan=False), file=_stdout.get() or sys.stdout, flush=True)


def _plain(value: Any) -> Any:
    """Return the value with None in the place of NaN and infinities, which are no JSON."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
