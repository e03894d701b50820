"""The JSONL files of a prepare job: their identity by their bytes, and whether they may be used together."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeAlias

from draftcache.store.common.errors import InputError
from draftcache.store.common.files import hash_file

Source: TypeAlias = dict[str, Any]
"""`file`, `bytes` and `xxh3_128` of one file, as the dataset's manifest has them."""


def describe_sources(paths: list[Path]) -> list[Source]:
    """Return the sources of one split. Raises InputError for a path that is no regular file."""
    for path in paths:
        if not path.is_file():
            raise InputError(f"{path}: expected a JSONL file, found {'a directory' if path.is_dir() else 'nothing'}")
    return [{"file": str(path), "bytes": path.stat().st_size, "xxh3_128": hash_file(path)} for path in paths]


def refuse_shared_files(sources: dict[str, list[Source]], *, held_out: Collection[str]) -> None:
    """Raise InputError where a held-out split has a file that another split is trained on with, by its bytes."""
    trained = {
        source["xxh3_128"]: f"{name}={source['file']}"
        for name, files in sources.items()
        for source in files
        if name not in held_out and source["bytes"]
    }
    for name in held_out:
        for source in sources[name]:
            if (other := trained.get(source["xxh3_128"])) is not None:
                raise InputError(
                    f"--held-out {name}={source['file']}: expected rows that are not trained on, found the same bytes "
                    f"as {other}"
                )
