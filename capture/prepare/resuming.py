"""What a prepare job that was killed had finished, and how the same job takes it over."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from draftcache.store.common.attempts import Attempt
from draftcache.store.common.errors import DraftcacheError
from draftcache.store.common.files import atomic_path
from draftcache.store.common.sealed_json import seal, unseal

PROGRESS = "progress.json"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a job has come, as its directory records it: what is written behind that is written again."""

    job: str  # hash of what decides the dataset's content
    chunks: int = 0  # finished, in their order over all splits
    notes: list[dict[str, Any]] = field(default_factory=list)
    dropped: dict[str, dict[str, int]] = field(default_factory=dict)  # by split and by the split of the first row
    splits: dict[str, dict[str, Any]] = field(default_factory=dict)  # what `SplitWriter.save` returned

    def save(self, directory: Path) -> None:
        """Write it, atomically and durably."""
        with atomic_path(directory / PROGRESS) as partial:
            partial.write_bytes(seal(asdict(self)))


def take_over(output: Path, own: Path, job: str) -> Progress | None:
    """Rename what an ended run of the same job left furthest along to `own`; None where there is nothing.

    `output` is the path that the job writes, beside which its runs work. A run that may still live keeps what it has;
    one of this process has ended, as the caller holds the lock of `output`.
    """
    found = [
        (progress.chunks, path, progress)
        for path in output.parent.glob(f".{glob_text(output.name)}.*.partial")
        if (attempt := Attempt.named(path)) is not None
        and attempt.final == output.name
        and (attempt.has_ended() or attempt.is_of_this_process())
        and (progress := _progress(path)) is not None
        and progress.job == job
    ]
    for _, path, progress in sorted(found, key=lambda item: item[0], reverse=True):
        try:
            path.rename(own)
        except OSError:  # another run has taken it
            continue
        return progress
    return None


def glob_text(name: str) -> str:
    """A pattern that only `name` itself matches."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _progress(directory: Path) -> Progress | None:
    if not (directory / PROGRESS).is_file():
        return None
    try:
        found = unseal((directory / PROGRESS).read_bytes(), PROGRESS)
        return Progress(**{field.name: found[field.name] for field in fields(Progress)})
    except (OSError, DraftcacheError, KeyError):  # it is damaged, or of another version
        return None
