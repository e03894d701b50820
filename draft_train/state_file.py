"""state.json of a checkpoint: sealed by its own hash, so that a change of any byte is refused.

It also holds the hashes of the checkpoint's other files. Version 1, which earlier versions of draftcache wrote, had no
hash of its own: such a file is read, with a line on stderr that says so.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any

from draftcache.draft_train.drafts.protocol import CheckpointState
from draftcache.draft_train.drafts.registry import DEFAULT, find_architecture
from draftcache.store.common.errors import CheckpointError, DraftcacheError
from draftcache.store.common.files import read_json
from draftcache.store.common.sealed_json import SEAL, seal, unseal

STATE_NAME = "state.json"
FORMAT = "draftcache-checkpoint"
VERSION = 2
_UNSEALED = 1
"""The version that had no hash of its own."""


def state_bytes(state: CheckpointState, hashes: Mapping[str, str]) -> bytes:
    """Return the content of state.json. `hashes` holds the xxh3-128 of the files beside it, by name."""
    return seal({"format": FORMAT, "version": VERSION, **asdict(state), "files": dict(hashes)})


def read_state(directory: Path) -> tuple[CheckpointState, dict[str, str]]:
    """Return the content of state.json, and the hashes of the files beside it.

    Raises CheckpointError where it is missing, changed, or of another format or version.
    """
    body = _read_body(directory / STATE_NAME)
    names = [item.name for item in fields(CheckpointState)]
    values: dict[str, Any] = {"architecture": DEFAULT, "longest": 0, "code": {}}
    values |= {name: body[name] for name in names if name in body}
    missing = sorted({*names, "files"} - values.keys() - body.keys())
    if missing:
        raise CheckpointError(f"{directory / STATE_NAME}: expected the fields {missing}, found none of them")
    shape = find_architecture(values["architecture"]).read_shape(values["shape"])
    return CheckpointState(**values | {"shape": shape}), body["files"]


def _read_body(file: Path) -> dict[str, Any]:
    try:
        body = read_json(file)
    except DraftcacheError as exc:
        raise CheckpointError(f"{file.parent}: expected a checkpoint with {STATE_NAME} ({exc})") from exc
    # A file with a hash is checked whatever version it claims, as a changed version would be a way round the check.
    sealed = isinstance(body, dict) and SEAL in body
    if sealed:
        try:
            body = unseal(file.read_bytes(), str(file))
        except DraftcacheError as exc:
            raise CheckpointError(f"{exc}; use another checkpoint of the run, or a copy of this one") from exc
    expected = VERSION if sealed else _UNSEALED
    if not isinstance(body, dict) or (body.get("format"), body.get("version")) != (FORMAT, expected):
        found = [body.get("format"), body.get("version"), body.get(SEAL)] if isinstance(body, dict) else type(body)
        raise CheckpointError(
            f"{file}: expected {FORMAT} version {VERSION} with its hash in {SEAL!r}, or version {_UNSEALED} without, "
            f"found {found}; it is damaged, or another version of draftcache wrote it"
        )
    if not sealed:
        _say_unsealed(file)
    return body


@cache
def _say_unsealed(file: Path) -> None:
    """Say once per file of this process that it cannot be checked."""
    print(
        f"{file}: an earlier version of draftcache wrote it without its own hash, so no change of it would be noticed",
        file=sys.stderr,
    )
