"""What a generate job has finished, beside its output until that is complete.

    .OUTPUT.unfinished/job.json             the job's settings
    .OUTPUT.unfinished/answers-*.jsonl      one file per run: a line for every sample that was answered or refused
    .OUTPUT.unfinished/.order.jsonl.*       of the run at work: the samples and unusable rows, in the order of the input

Every run writes files of its own, so that two never write into one, even where locks do not lock. A line holds the hash
of its values: one that a kill cut off, or that is damaged, does not count, and its sample is asked for again. So is a
sample that an earlier run could not use, since a server may be mended meanwhile.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from draftcache.store.common.attempts import attempt_path, remove_ended
from draftcache.store.common.errors import InputError
from draftcache.store.common.files import fsync_directory, hash_json, read_json, write_json
from draftcache.store.common.sealed_json import SEAL
from draftcache.store.common.strict_json import parse_json

_JOB = "job.json"
_ORDER = "order.jsonl"


class UnfinishedJob:
    """The folder of a job that is not complete. Use as a context manager, by one process at a time."""

    def __init__(self, output: Path, settings: dict[str, Any], *, overwrite: bool) -> None:
        """`settings` decide the output. What another job left is discarded with `overwrite`, and else refused."""
        self.path = unfinished_path(output)
        self._settings = settings
        self._overwrite = overwrite
        self._places: dict[bytes, tuple[int, int]] = {}  # about 250 bytes per sample: file, offset
        self._files: list[IO[bytes]] = []
        self._closing = ExitStack()

    def __enter__(self) -> Self:
        self._take_over()
        with ExitStack() as opened:
            for path in sorted(self.path.glob("answers-*.jsonl")):
                file = opened.enter_context(path.open("rb"))
                self._index(len(self._files), file)
                self._files.append(file)
            own = self.path / f"answers-{uuid.uuid4().hex}.jsonl"
            self._answers = opened.enter_context(own.open("a+b"))
            self._files.append(self._answers)
            order = attempt_path(self.path / _ORDER)
            opened.callback(order.unlink, missing_ok=True)
            self._order = opened.enter_context(order.open("w+b"))
            fsync_directory(self.path)
            self._closing = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if not self._answers.closed:
                self.save()
        finally:
            self._closing.close()

    def __len__(self) -> int:
        """The samples that are finished."""
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return bytes.fromhex(key) in self._places

    def add(self, key: str, record: dict[str, Any]) -> None:
        """Write what came of a sample. A kill of this process does not lose it."""
        record = {"key": key, **record}
        offset = self._answers.seek(0, os.SEEK_END)
        self._answers.write(_line({**record, SEAL: hash_json(record)}))
        self._answers.flush()
        self._places[bytes.fromhex(key)] = len(self._files) - 1, offset

    def record(self, key: str) -> dict[str, Any]:
        """Return what came of a finished sample."""
        number, offset = self._places[bytes.fromhex(key)]
        self._files[number].seek(offset)
        found = _unsealed(self._files[number].readline())
        if found is None or found["key"] != key:
            raise InputError(f"{self.path}: expected what was written, found damage; run the same command again")
        return found

    def save(self) -> None:
        """Make durable what was added, so that a power cut does not lose it either."""
        self._answers.flush()
        os.fsync(self._answers.fileno())

    def note(self, entry: dict[str, Any]) -> None:
        """Append a sample or an unusable row, in the order of the input."""
        self._order.write(_line(entry))

    def notes(self) -> Iterator[dict[str, Any]]:
        """Yield all that was noted, in order."""
        self._order.flush()
        self._order.seek(0)
        yield from map(json.loads, self._order)

    def remove(self) -> None:
        """Delete the folder, once the output is complete."""
        self._closing.close()
        shutil.rmtree(self.path)

    def _take_over(self) -> None:
        if self.path.exists():
            found = read_json(self.path / _JOB) if (self.path / _JOB).is_file() else self._settings
            if found != self._settings:
                if not self._overwrite:
                    raise InputError(
                        f"{self.path}: expected what an earlier run of the same job left, found another job's: "
                        f"{different_settings(found, self._settings)}; choose another --output, or discard what that "
                        "job has finished with --overwrite"
                    )
                shutil.rmtree(self.path)
        self.path.mkdir(exist_ok=True)
        if not (self.path / _JOB).is_file():
            write_json(self.path / _JOB, self._settings)
        remove_ended(self.path, final=_ORDER)

    def _index(self, number: int, file: IO[bytes]) -> None:
        offset = 0
        for line in file:
            found = _unsealed(line)
            if found is not None and "rejected" not in found:
                self._places[bytes.fromhex(found["key"])] = number, offset
            offset += len(line)


def unfinished_path(output: Path) -> Path:
    """Where the job that writes `output` keeps what it has finished."""
    return output.with_name(f".{output.name}.unfinished")


def different_settings(found: Any, wanted: dict[str, Any]) -> str:
    """Name the settings in which two jobs differ, with both values."""
    if not isinstance(found, dict):
        return "settings that are none"
    names = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
    return "; ".join(f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} here" for name in names)


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


def _unsealed(line: bytes) -> dict[str, Any] | None:
    """The values of a line; None where it was cut off or changed."""
    try:
        values = parse_json(line)
        found = {name: value for name, value in values.items() if name != SEAL}
        whole = line.endswith(b"\n") and values[SEAL] == hash_json(found) and isinstance(found["key"], str)
    except (ValueError, KeyError, AttributeError, TypeError):
        return None
    return found if whole else None
