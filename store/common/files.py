"""Durable small files, and hashes of bytes.

A file is written under a temporary name beside its final name, made durable by fsync, and renamed; then the parent
directory is made durable. Every hash is xxh3-128, as 32 hexadecimal digits.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import xxhash

from draftcache.store.common.attempts import attempt_path, remove_ended
from draftcache.store.common.errors import InputError
from draftcache.store.common.strict_json import parse_json

_HASH_BLOCK = 1 << 22

Buffer: TypeAlias = bytes | bytearray | memoryview
"""A value that can be hashed or written. A numpy array is passed as its `data`."""


def canonical_json(value: Any) -> str:
    """Return JSON text that is equal for equal values: keys are sorted and there are no spaces."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def hash_json(value: Any) -> str:
    """Return the hash of the canonical JSON text of `value`."""
    return xxhash.xxh3_128_hexdigest(canonical_json(value).encode())


def hash_blocks(blocks: Iterable[Buffer]) -> str:
    """Return the hash of the concatenated blocks."""
    digest = xxhash.xxh3_128()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def hash_bytes(*parts: Buffer) -> str:
    """Return the hash of the concatenated parts."""
    return hash_blocks(parts)


def hash_file(path: Path) -> str:
    """Return the hash of a file's bytes."""
    with path.open("rb") as file:
        return hash_blocks(iter(lambda: file.read(_HASH_BLOCK), b""))


def fsync_directory(path: Path) -> None:
    """Make renames and creations inside a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(path: Path) -> None:
    """Make every file and directory below `path` durable."""
    for directory, _, names in os.walk(path):
        for name in names:
            descriptor = os.open(Path(directory) / name, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        fsync_directory(Path(directory))


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`. On success it durably takes `path`'s name, otherwise it is removed.

    A reader sees the old file or the whole new one, whenever the writer is killed. What killed writers of this machine
    left half written is removed first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_ended(path.parent, final=path.name)
    partial = attempt_path(path)
    try:
        yield partial
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        partial.replace(path)
        fsync_directory(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary directory beside `path`, at which there must be nothing, or an empty directory.

    On success it durably takes `path`'s name, otherwise it is removed. A reader sees no directory or the whole one,
    whenever the writer is killed. What killed writers of this machine left half written is removed first. Raises
    FileExistsError, before anything is written or at the end, where there is something at `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_ended(path.parent, final=path.name)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(errno.EEXIST, "expected nothing there, found something", str(path))
    partial = attempt_path(path)
    partial.mkdir()
    try:
        yield partial
        fsync_tree(partial)
        try:
            partial.rename(path)
        except OSError as exc:
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise FileExistsError(errno.EEXIST, "expected nothing there, found something", str(path)) from exc
        fsync_directory(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Delete a directory so that a kill leaves it whole, or under the hidden name of an attempt."""
    partial = attempt_path(path)
    path.rename(partial)
    fsync_directory(path.parent)
    shutil.rmtree(partial)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically and durably."""
    with atomic_path(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def require_file(path: Path, what: str) -> None:
    """Raise InputError where no regular file is at `path`. Reading a pipe, for one, would wait for ever.

    `what` is what should be there, with its article.
    """
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError as exc:
        raise InputError(f"{path}: expected {what}, found nothing there") from exc
    except OSError as exc:
        raise InputError(f"{path}: expected {what}, found what can't be looked at ({exc.strerror})") from exc
    if not is_file:
        raise InputError(f"{path}: expected {what}, found something that is no regular file")


_READ_BY_LIBRARIES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".vocab", ".bpe", ".spm", ".py", ".safetensors")


def require_regular_files(directory: Path) -> None:
    """Raise InputError where something in a model's or tokenizer's directory is named as a file and is a pipe, say.

    Libraries open such files by themselves, and opening a pipe waits for ever. Directories and links that lead nowhere
    are left to them. Nothing is checked where there is no such directory.
    """
    folders = (directory, directory / "additional_chat_templates")
    for path in sorted(path for folder in folders if folder.is_dir() for path in folder.iterdir()):
        if path.suffix in _READ_BY_LIBRARIES and path.exists() and not path.is_dir():
            require_file(path, f"a {path.suffix} file")


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises InputError, which names the path, where it is missing or not JSON."""
    require_file(path, "a JSON file")
    try:
        return parse_json(path.read_bytes())
    except OSError as exc:
        raise InputError(f"{path}: expected a JSON file, found one that can't be read ({exc.strerror})") from exc
    except InputError:
        raise
    except ValueError as exc:
        raise InputError(f"{path}: expected JSON, found something else ({exc})") from exc
