"""A verification's notes of the shards that it has checked, from which the same one goes on after it was killed.

The notes are a file of their own and not part of the store, which may be read-only. It holds one line of JSON per
shard, behind a first line that says which verification it belongs to. Each line holds its own hash. A line that was
torn by a kill or has changed since is ignored, and its shard is checked again.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from draftcache.store.common.errors import InputError
from draftcache.store.common.files import canonical_json, hash_json
from draftcache.store.common.locks import take_lock
from draftcache.store.common.sealed_json import SEAL
from draftcache.store.common.strict_json import parse_json
from draftcache.store.format.commits import Record
from draftcache.store.shard_checks import ShardReport
from draftcache.store.shard_choice import ShardChoice
from draftcache.store.storage.base import Storage

FORMAT = "draftcache verify journal"
VERSION = 1


class VerifyJournal:
    """The notes of one verification, in the file `path`. Use as a context manager.

    The file is created where there is none, and removed by `finish`: it is there only while a verification has not
    finished, so that no later verification takes old notes for its own work.
    """

    def __init__(self, path: Path, storage: Storage, manifest_hash: str, choice: ShardChoice) -> None:
        """Open the notes. Raises InputError where the file holds something else, belongs to another verification, or
        another process is writing it; OSError.
        """
        self.path = path
        place = storage.describe() if storage.local_root is None else str(storage.local_root.resolve())
        heading = {
            "format": FORMAT,
            "version": VERSION,
            "store": place,
            "manifest_hash": manifest_hash,
            "quick": choice.quick,
            "sample": choice.sample,
            "seed": choice.seed,
        }
        lock = take_lock(path)
        if lock is None:
            raise InputError(f"--journal {path}: expected a file of this run alone, found another verify writing it")
        self._lock = lock
        try:
            lines = path.read_bytes().split(b"\n")
            torn = lines.pop()
            if lines or torn:
                self._require_heading(lines[0] if lines else torn, heading)
            else:
                self._append(heading)
            if lines and torn:
                os.write(self._end(), b"\n")  # or the next line would continue the torn one, and be ignored with it
        except BaseException:
            lock.release()
            raise
        notes = [note for note in map(_unseal_line, lines[1:]) if note is not None]
        self._checked = {(note["shard"], note["record"], note["in_full"]) for note in notes if not note["damages"]}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def has(self, shard: int, record: Record, *, in_full: bool) -> bool:
        """Return whether this shard was checked, as thoroughly as is asked for, with this very commit record, and was
        good.

        A damaged shard is checked again: it may have been repaired, and a shard that was made again has equal records.
        """
        key = hash_json(record)
        return (shard, key, True) in self._checked or (not in_full and (shard, key, False) in self._checked)

    def add(self, found: ShardReport, *, in_full: bool) -> None:
        """Note what the checks of a shard found. Without a commit record that can be read there is nothing to note."""
        if found.record is None:
            return
        damages = [asdict(damage) for damage in found.damages]
        self._append({"shard": found.number, "record": hash_json(found.record), "in_full": in_full, "damages": damages})

    def finish(self) -> None:
        """Remove the file, as the verification has come to its end."""
        self.path.unlink(missing_ok=True)

    def _require_heading(self, line: bytes, heading: dict[str, Any]) -> None:
        found = _unseal_line(line)
        if found is None or found.get("format") != FORMAT:
            raise InputError(
                f"--journal {self.path}: expected the journal of a verification, found another file or a damaged first "
                "line; name another file, or remove this one to start from the beginning"
            )
        for name, expected in heading.items():
            if found.get(name) != expected:
                raise InputError(
                    f"--journal {self.path}: {name}: expected {expected!r}, found {found.get(name)!r}: it is the "
                    "journal of another verification; name another file, or remove this one to start from the beginning"
                )

    def _append(self, note: dict[str, Any]) -> None:
        data = canonical_json({**note, SEAL: hash_json(note)}).encode() + b"\n"
        end = self._end()
        while data:  # a write may take only a part
            data = data[os.write(end, data) :]

    def _end(self) -> int:
        os.lseek(self._lock.descriptor, 0, os.SEEK_END)
        return self._lock.descriptor


def _unseal_line(line: bytes) -> dict[str, Any] | None:
    """Return what a line holds, or None where any byte of it is not as it was written."""
    try:
        value = parse_json(line)
        if not isinstance(value, dict) or canonical_json(value).encode() != line:
            return None
        content = {name: item for name, item in value.items() if name != SEAL}
        return content if value.get(SEAL) == hash_json(content) else None
    except ValueError:
        return None
