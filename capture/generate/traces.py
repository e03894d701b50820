"""The finished output: rows of token ids that prepare reads, what could not be used, and a manifest.

    manifest.json               sealed with its own hash: settings, counts, sizes and hashes of the files
    SPLIT/rows.jsonl            one row per sample, in the order of the input
    quarantine/SPLIT.jsonl      one record per unusable row or sample: file, line, reason, expected, found

A row has `token_ids` (prompt and answer), `loss_mask` (1 on the answer, with the token that ended it), `answer` (its
text), `source` (file:line), `id` (the source's own, if it has one), `prompt` (hash of its ids), `turn`, `sample` and
`finish_reason` ("length": --max-new-tokens cut it off).
"""

from __future__ import annotations

import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from draftcache.capture.generate.unfinished import UnfinishedJob
from draftcache.capture.prepare.rows.rejections import Rejection
from draftcache.store.common.errors import InputError, StoreError
from draftcache.store.common.files import atomic_directory, hash_file, remove_directory
from draftcache.store.common.sealed_json import seal, unseal

FORMAT = "draftcache-traces"
VERSION = 1
MANIFEST = "manifest.json"
QUARANTINE = "quarantine"
ROWS = "rows.jsonl"


class _Split:
    """Writes one split, and counts it."""

    def __init__(self, rows: IO[bytes], quarantine: IO[bytes]) -> None:
        self._rows, self._quarantine = rows, quarantine
        self.counts: Counter[str] = Counter()
        self.quarantined: Counter[str] = Counter()
        self.first_rejection: Rejection | None = None
        self._keys: set[bytes] = set()

    def reject(self, rejection: Rejection) -> None:
        self.first_rejection = self.first_rejection or rejection
        self.quarantined[rejection.reason] += 1
        self._quarantine.write(json.dumps(rejection.as_json(), ensure_ascii=True).encode() + b"\n")

    def write(self, note: dict[str, Any], record: dict[str, Any], *, drop_truncated: bool) -> None:
        """Write the row of a sample, or why it has none."""
        if "rejected" in record:
            self.reject(Rejection(file=note["file"], line=note["line"], **record["rejected"]))
            return
        truncated = record["finish_reason"] == "length"
        self.counts["truncated"] += truncated
        if truncated and drop_truncated:
            return
        key = bytes.fromhex(note["key"])
        self.counts["equal_to_earlier"] += key in self._keys
        self._keys.add(key)
        prompt, ids = record["prompt_tokens"], record["token_ids"]
        self.counts["rows"] += 1
        self.counts["tokens"] += len(ids)
        self.counts["answer_tokens"] += len(ids) - prompt
        self.counts["retokenised"] += record["retokenised"]
        row = {
            "token_ids": ids,
            "loss_mask": [0] * prompt + [1] * (len(ids) - prompt),
            "answer": record["answer"],
            "source": f"{note['file']}:{note['line']}",
            **({} if note["id"] is None else {"id": note["id"]}),
            "prompt": record["prompt"],
            "turn": note["turn"],
            "sample": note["sample"],
            "finish_reason": record["finish_reason"],
        }
        self._rows.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")

    def record(self) -> dict[str, Any]:
        names = ("rows", "tokens", "answer_tokens", "truncated", "equal_to_earlier", "retokenised")
        return {
            **{name: self.counts[name] for name in names},
            "quarantined": self.quarantined.total(),
            "quarantined_by_reason": dict(sorted(self.quarantined.items())),
        }


def write_traces(
    output: Path, job: UnfinishedJob, settings: dict[str, Any], splits: list[str], *, overwrite: bool
) -> dict[str, Any]:
    """Write all that a job has noted, in order, and give the folder its name. Returns the manifest.

    Raises InputError for a split without a row.
    """
    if overwrite and output.exists():
        remove_directory(output)
    with atomic_directory(output) as partial:
        (partial / QUARANTINE).mkdir()
        with ExitStack() as files:
            writers = {}
            for name in splits:
                (partial / name).mkdir()
                rows = files.enter_context((partial / name / ROWS).open("wb"))
                quarantine = files.enter_context((partial / QUARANTINE / f"{name}.jsonl").open("wb"))
                writers[name] = _Split(rows, quarantine)
            for note in job.notes():
                writer = writers[note["split"]]
                if "rejected" in note:
                    writer.reject(Rejection(**note["rejected"]))
                else:
                    writer.write(note, job.record(note["key"]), drop_truncated=settings["--drop-truncated"])
        for name, writer in writers.items():
            _refuse_empty(name, writer)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "settings": settings,
            "splits": {name: writer.record() for name, writer in writers.items()},
            "files": {
                path.relative_to(partial).as_posix(): {"bytes": path.stat().st_size, "xxh3_128": hash_file(path)}
                for path in sorted(partial.rglob("*.jsonl"))
            },
        }
        (partial / MANIFEST).write_bytes(seal(manifest))
    return manifest


def read_manifest(output: Path) -> dict[str, Any] | None:
    """Return the manifest of finished traces whose files have their sizes; None where there are none."""
    try:
        manifest = unseal((output / MANIFEST).read_bytes(), str(output / MANIFEST))
        sizes = {name: item["bytes"] for name, item in manifest["files"].items()}
        whole = all((output / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, StoreError, KeyError, AttributeError, TypeError):
        return None
    return manifest if whole and manifest.get("format") == FORMAT else None


def _refuse_empty(name: str, split: _Split) -> None:
    if split.counts["rows"]:
        return
    if split.counts["truncated"]:
        raise InputError(
            f"split {name}: expected at least one whole answer, found that all {split.counts['truncated']} were cut "
            "off, which --drop-truncated leaves out; take more --max-new-tokens"
        )
    if split.first_rejection is None:
        raise InputError(f"split {name}: expected at least one row, found none")
    raise InputError(
        f"split {name}: expected at least one answer, found {split.quarantined.total()} rows, all set aside "
        f"({dict(split.quarantined)}); the first: {split.first_rejection}"
    )
