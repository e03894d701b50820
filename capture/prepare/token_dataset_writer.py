"""Write a prepared dataset under a partial name, make it durable and rename it, so that no incomplete one is seen."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from draftcache.capture.prepare.duplicates import DuplicateTable
from draftcache.capture.prepare.rows.rejections import Rejection
from draftcache.capture.prepare.statistics import SplitStatistics
from draftcache.capture.prepare.token_dataset import (
    CONVERSATION_DTYPE,
    FORMAT,
    MANIFEST,
    QUARANTINE,
    TOKENIZER,
    VERSION,
    is_prepared,
)
from draftcache.store.common.attempts import attempt_path, remove_ended
from draftcache.store.common.errors import InputError
from draftcache.store.common.files import fsync_directory, fsync_tree, hash_file
from draftcache.store.common.locks import take_lock
from draftcache.store.common.sealed_json import seal


class _GrowingArray:
    """A one-dimensional .npy file whose length is known only when it is closed."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self.length = 0
        self.file: IO[bytes] = path.open("wb")
        self._header()
        self._header_bytes = self.file.tell()

    def append(self, values: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(values, self.dtype).tobytes())
        self.length += len(values)

    def close(self) -> None:
        # numpy pads headers so that the first axis can grow in place; a header of another size would shift the data.
        self.file.seek(0)
        self._header()
        if self.file.tell() != self._header_bytes:
            raise AssertionError("numpy wrote a .npy header of another size")
        self.file.close()

    def _header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.length,),
        }
        np.lib.format.write_array_header_1_0(self.file, header)


class SplitWriter:
    """Appends conversations to one split; `record()` are its totals for the manifest.

    `duplicates` is the table of all splits of the dataset, which are written one after the other.
    """

    def __init__(self, path: Path, vocab_size: int, duplicates: DuplicateTable) -> None:
        path.mkdir(parents=True)
        self.path = path
        self.counts = np.zeros(vocab_size, np.int64)
        self.quarantined: Counter[str] = Counter()
        self.first_rejection: Rejection | None = None
        self.totals: Counter[str] = Counter()
        self._statistics = SplitStatistics()
        self._duplicates = duplicates
        self._token_ids = _GrowingArray(path / "token_ids.npy", np.dtype("<u4"))
        self._loss_mask = _GrowingArray(path / "loss_mask.npy", np.dtype("?"))
        self._conversations = _GrowingArray(path / "conversations.npy", CONVERSATION_DTYPE)
        self._quarantine = (path / QUARANTINE).open("w", encoding="utf-8")

    def append(self, token_ids: np.ndarray, loss_mask: np.ndarray, conversations: np.ndarray) -> None:
        """Append packed conversations: uint32 [t], bool [t], CONVERSATION_DTYPE [n]; sets their `first_token`.

        Those that the table of duplicates does not keep are left out.
        """
        keep = self._duplicates.keep(self.path.name, conversations["content_hash"].tolist())
        if not keep.all():
            kept_tokens = np.repeat(keep, conversations["tokens"])
            token_ids, loss_mask, conversations = token_ids[kept_tokens], loss_mask[kept_tokens], conversations[keep]
        lengths = conversations["tokens"]
        conversations["first_token"] = self._token_ids.length + np.cumsum(lengths) - lengths
        self.totals["rows"] += len(conversations)
        self.totals["tokens"] += int(lengths.sum())
        self.totals["untruncated_tokens"] += int(conversations["untruncated_tokens"].sum())
        self.totals["truncated_rows"] += int((conversations["untruncated_tokens"] > lengths).sum())
        self.totals["loss_tokens"] += int(conversations["loss_tokens"].sum())
        self._statistics.add(loss_mask, lengths)
        self.counts += np.bincount(token_ids[loss_mask], minlength=len(self.counts))
        self._token_ids.append(token_ids)
        self._loss_mask.append(loss_mask)
        self._conversations.append(conversations)

    def reject(self, rejection: Rejection) -> None:
        """Record a row that cannot be used."""
        self.first_rejection = self.first_rejection or rejection
        self.quarantined[rejection.reason] += 1
        self._statistics.reject(rejection)
        self._quarantine.write(json.dumps(rejection.as_json(), ensure_ascii=True) + "\n")

    def close(self) -> None:
        """Complete and close the files."""
        for array in (self._token_ids, self._loss_mask, self._conversations):
            array.close()
        np.save(self.path / "token_counts.npy", self.counts, allow_pickle=False)
        self._quarantine.close()

    def abandon(self) -> None:
        """Close the files without completing them; after `close` this does nothing."""
        for array in (self._token_ids, self._loss_mask, self._conversations):
            array.file.close()
        self._quarantine.close()

    def record(self) -> dict[str, Any]:
        """Rows, token totals, averages, lengths, duplicates and quarantine counts, for the manifest.

        `read_rows` are all rows: those that are stored, quarantined or, by `dropped_duplicates`, dropped.
        """
        totals = {
            key: self.totals[key]
            for key in (
                "rows",
                "untruncated_tokens",
                "tokens",
                "truncated_rows",
                "loss_tokens",
            )
        }
        read_rows = totals["rows"] + self.quarantined.total() + sum(self.dropped_rows.values())
        rows, tokens = max(totals["rows"], 1), max(totals["tokens"], 1)
        return {
            **totals,
            "duplicate_rows": self._duplicates.repeated_rows(self.path.name),
            "truncation_loss_tokens": totals["untruncated_tokens"] - totals["tokens"],
            "loss_fraction": totals["loss_tokens"] / tokens,
            "average_untruncated_tokens": totals["untruncated_tokens"] / rows,
            "average_tokens": totals["tokens"] / rows,
            "average_loss_tokens": totals["loss_tokens"] / rows,
            "unique_loss_ids": int(np.count_nonzero(self.counts)),
            "quarantined_rows": self.quarantined.total(),
            "quarantined_by_reason": dict(sorted(self.quarantined.items())),
            "read_rows": read_rows,
            "dropped_duplicates": self.dropped_rows,
            **self._statistics.record(read_rows),
        }

    @property
    def dropped_rows(self) -> dict[str, int]:
        """Rows that were left out, by the split that has the first row of the same content."""
        return self._duplicates.dropped_rows(self.path.name)


class DatasetWriter:
    """Writes into a hidden directory beside `output` until `commit` renames it. Use as a context manager.

    The hidden directory is this attempt's own, so that two runs never write into one, even where locks do not lock. A
    lock keeps a second run from working in vain.
    """

    def __init__(self, output: Path, *, overwrite: bool = False, drop_duplicates: bool = False) -> None:
        self.output = output
        self.overwrite = overwrite
        self.partial = attempt_path(output)
        self.duplicates = DuplicateTable(drop=drop_duplicates)
        self._cleanup = ExitStack()

    def __enter__(self) -> DatasetWriter:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._cleanup.enter_context(_exclusive(self.output))
        try:
            check_output(self.output, overwrite=self.overwrite)
            remove_ended(self.output.parent, final=self.output.name)
            self.partial.mkdir()
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.callback(shutil.rmtree, self.partial, ignore_errors=True)
        self._cleanup.close()

    def split(self, name: str, vocab_size: int) -> SplitWriter:
        """Start one split. Splits are written in the order in which their first rows are appended."""
        split = SplitWriter(self.partial / name, vocab_size, self.duplicates)
        self._cleanup.callback(split.abandon)
        return split

    def write_tokenizer(self, backend_json: str) -> None:
        """Write the tokenizer that made the ids, as `tokenizers` serialises it, so that they can be shown as text."""
        (self.partial / TOKENIZER).write_text(backend_json, encoding="utf-8")

    def commit(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Complete the manifest with sizes and hashes, write it last, make all files durable and rename the directory.

        Returns the complete manifest.
        """
        files = sorted(path for path in self.partial.rglob("*") if path.is_file())
        complete = {
            "format": FORMAT,
            "version": VERSION,
            **manifest,
            "drop_duplicates": self.duplicates.drop,
            "shared_rows": self.duplicates.shared_rows(),
            "files": {
                path.relative_to(self.partial).as_posix(): {
                    "bytes": path.stat().st_size,
                    "xxh3_128": hash_file(path),
                }
                for path in files
            },
        }
        (self.partial / MANIFEST).write_bytes(seal(complete))
        fsync_tree(self.partial)
        self._publish()
        return complete

    def _publish(self) -> None:
        replaced = attempt_path(self.output)
        try:
            if self.overwrite and (self.output / MANIFEST).exists():
                self.output.rename(replaced)
            self.partial.rename(self.output)
        except OSError as exc:
            if replaced.exists() and not self.output.exists():
                replaced.rename(self.output)
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                raise
            raise InputError(
                f"{self.output}: expected no other writer, found that another prepare has just finished there; "
                "run the command again"
            ) from exc
        finally:
            fsync_directory(self.output.parent)
            shutil.rmtree(replaced, ignore_errors=True)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise InputError unless `output` does not exist, is empty, or is a dataset that may be replaced."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not is_prepared(output):
        raise InputError(f"--output {output}: expected a new path, found something that is no prepared dataset")
    if not overwrite:
        raise InputError(
            f"--output {output}: expected a new path or a dataset made by the same job, found a dataset "
            "that is damaged or was made from other inputs or settings; choose another path, or replace it with "
            "--overwrite"
        )


@contextmanager
def _exclusive(output: Path) -> Iterator[None]:
    """Hold the lock of a dataset's path, a file beside it that is removed at the end. Raises InputError."""
    path = output.with_name(f".{output.name}.lock")
    lock = take_lock(path)
    if lock is None:
        raise InputError(f"{output}: expected no other writer, found another prepare at work there")
    try:
        # Between opening and locking, another run may have ended and removed the file, and a third one made a new one.
        if not path.exists() or os.fstat(lock.descriptor).st_ino != path.stat().st_ino:
            raise InputError(f"{output}: another prepare has just finished there; run the command again")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        lock.release()
