"""Commit records: a file of a store counts only once `commit/<name>.json` says its size and xxh3-128.

Order of a commit: write under a temporary name, fsync, rename, fsync the parent, then the record by rename.
A reader that starts from the records therefore never sees half a shard, whenever the writer was killed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from store.errors import ShardDamagedError, StoreError
from store.files import hash_file, read_json, write_json

COMMIT_DIRECTORY = "commit"


def record_path(root: Path, name: str) -> Path:
    """Path of the commit record `name`: a shard number or a top-level file's stem."""
    return root / COMMIT_DIRECTORY / f"{name}.json"


def describe_files(root: Path, paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Size and xxh3-128 of each file, by its path relative to the store."""
    return {
        path.relative_to(root).as_posix(): {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)}
        for path in sorted(paths)
    }


def write_record(root: Path, name: str, files: list[Path], extra: dict[str, Any] | None = None) -> None:
    """Publish files that are already durable under their final names."""
    write_json(record_path(root, name), {"files": describe_files(root, files)} | (extra or {}))


def read_record(root: Path, name: str) -> dict[str, Any] | None:
    """The commit record, or None where nothing of this name was committed."""
    path = record_path(root, name)
    if not path.is_file():
        return None
    record = read_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        raise StoreError(f"{path}: expected a commit record with a `files` table, found something else")
    return record


def committed_shards(root: Path) -> list[int]:
    """Numbers of the shards that have a commit record, ascending."""
    return sorted(int(path.stem) for path in (root / COMMIT_DIRECTORY).glob("*.json") if path.stem.isdigit())


def check_record(root: Path, record: dict[str, Any], *, hashes: bool) -> None:
    """Raise ShardDamagedError naming the first file whose size (or, if asked, xxh3-128) differs."""
    for relative, expected in record["files"].items():
        path = root / relative
        if not path.is_file():
            raise ShardDamagedError(
                f"{path}: expected {expected['bytes']} bytes, found no file. Nothing reads as zeros in its place: "
                "remove the shard's commit record and rerun capture to make it again"
            )
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise ShardDamagedError(
                f"{path}: expected {expected['bytes']} bytes, found {size}; the file was cut or changed"
            )
        if hashes and (found := hash_file(path)) != expected["xxh3_128"]:
            raise ShardDamagedError(f"{path}: expected xxh3-128 {expected['xxh3_128']}, found {found}")


def require_file(root: Path, file_name: str) -> Path:
    """Path of a committed top-level file, its size checked. Raises StoreError or ShardDamagedError."""
    name = Path(file_name).stem
    record = read_record(root, name)
    if record is None:
        raise StoreError(f"{root}: expected {file_name} with its commit record, found none; rerun capture to finish it")
    check_record(root, record, hashes=False)
    return root / file_name
