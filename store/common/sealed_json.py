"""JSON files in which a change of any single byte is noticed.

The text of a file is a function of its values, and holds their hash.
"""

from __future__ import annotations

import json
from typing import Any

from draftcache.store.common.errors import StoreError
from draftcache.store.common.files import hash_json
from draftcache.store.common.strict_json import parse_json

SEAL = "xxh3_128"
"""The key under which a file holds the hash of its other values."""


def seal(value: dict[str, Any]) -> bytes:
    """Return a file's bytes, which hold `value` and the xxh3-128 of its canonical JSON."""
    return _text({**value, SEAL: hash_json(value)})


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """Return the value that was sealed. Raises StoreError, which names `where`, for any byte that has changed."""
    try:
        value = parse_json(data)
    except ValueError as exc:
        raise StoreError(f"{where}: expected JSON, found something else ({exc})") from exc
    if not isinstance(value, dict) or SEAL not in value:
        raise StoreError(f"{where}: expected a JSON object with its hash in {SEAL!r}, found none")
    content = {name: item for name, item in value.items() if name != SEAL}
    # The bytes are compared too: a change of white space leaves the values alone, yet the file has changed.
    if value[SEAL] != (found := hash_json(content)) or _text(value) != data:
        raise StoreError(
            f"{where}: expected values that hash to {value[SEAL]!r}, found {found}; it was edited or damaged"
        )
    return content


def _text(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
