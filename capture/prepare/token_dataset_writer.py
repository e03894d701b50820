"""Write a prepared dataset under a partial name, make it durable and rename it, so that no incomplete one is seen."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from draftcache.capture.prepare.duplicates import DuplicateTable
from draftcache.capture.prepare.notes import Notes
from draftcache.capture.prepare.resuming import PROGRESS, Progress, take_over
from draftcache.capture.prepare.split_writer import LeftoverError, SplitWriter
from draftcache.capture.prepare.token_dataset import FORMAT, MANIFEST, TOKENIZER, VERSION, is_prepared
from draftcache.store.common.attempts import attempt_path, remove_ended
from draftcache.store.common.errors import InputError
from draftcache.store.common.files import fsync_directory, fsync_tree, hash_file
from draftcache.store.common.locks import take_lock
from draftcache.store.common.sealed_json import seal


class DatasetWriter:
    """Writes into a hidden directory beside `output` until `commit` renames it. Use as a context manager.

    The hidden directory is this attempt's own, so that two runs never write into one, even where locks do not lock. A
    lock keeps a second run from working in vain.
    """

    def __init__(self, output: Path, *, job: str = "", overwrite: bool = False, drop_duplicates: bool = False) -> None:
        """`job` is the hash of what decides the content; what an ended run of it has finished is taken over."""
        self.output = output
        self.overwrite = overwrite
        self.partial = attempt_path(output)
        self.duplicates = DuplicateTable(drop=drop_duplicates)
        self.progress = Progress(job=job)
        self._cleanup = ExitStack()

    def __enter__(self) -> DatasetWriter:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._cleanup.enter_context(exclusive(self.output, "prepare"))
        try:
            check_output(self.output, overwrite=self.overwrite)
            if (found := take_over(self.output, self.partial, self.progress.job)) is not None:
                self.progress = found
            else:
                self.partial.mkdir()
            remove_ended(self.output.parent, final=self.output.name)
        except BaseException:
            self._cleanup.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave what can be gone on from, unless the job was done, or refused for its input."""
        if kind is None or not self.progress.chunks or issubclass(kind, InputError):
            self._cleanup.callback(shutil.rmtree, self.partial, ignore_errors=True)
        self._cleanup.close()

    def open_splits(self, names: Iterable[str], vocab_size: int) -> dict[str, SplitWriter]:
        """Start the splits, or go on with those of an ended run of the same job, whose every row is compared.

        `progress.chunks` says how many chunks are finished; it is 0 where the ended run's files are damaged.
        """
        names = list(names)
        try:
            return self._opened(names, vocab_size)
        except LeftoverError:
            shutil.rmtree(self.partial)
            self.partial.mkdir()
            self.duplicates = DuplicateTable(drop=self.duplicates.drop)
            self.progress = Progress(job=self.progress.job)
            return self._opened(names, vocab_size)

    def _opened(self, names: list[str], vocab_size: int) -> dict[str, SplitWriter]:
        splits = {}
        for name in names:
            state = self.progress.splits.get(name)
            splits[name] = SplitWriter(self.partial / name, vocab_size, self.duplicates, state)
            self._cleanup.callback(splits[name].abandon)
        self.duplicates.restore_dropped(self.progress.dropped)
        return splits

    def save_progress(self, chunks: int, notes: Notes, splits: Mapping[str, SplitWriter]) -> None:
        """Make durable that the first `chunks` chunks are finished: the same job goes on behind them."""
        self.progress = Progress(
            job=self.progress.job,
            chunks=chunks,
            notes=notes.as_json(),
            dropped=self.duplicates.all_dropped(),
            splits={name: split.save() for name, split in splits.items()},
        )
        self.progress.save(self.partial)

    def write_tokenizer(self, backend_json: str) -> None:
        """Write the tokenizer that made the ids, as `tokenizers` serialises it, so that they can be shown as text."""
        (self.partial / TOKENIZER).write_text(backend_json, encoding="utf-8")

    def commit(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Complete the manifest with sizes and hashes, write it last, make all files durable and rename the directory.

        Returns the complete manifest.
        """
        (self.partial / PROGRESS).unlink(missing_ok=True)
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
def exclusive(output: Path, command: str) -> Iterator[None]:
    """Hold the lock of a path that `command` writes, a file beside it that is removed at the end. Raises InputError."""
    path = output.with_name(f".{output.name}.lock")
    lock = take_lock(path)
    if lock is None:
        raise InputError(f"{output}: expected no other writer, found another {command} at work there")
    try:
        # Between opening and locking, another run may have ended and removed the file, and a third one made a new one.
        if not path.exists() or os.fstat(lock.descriptor).st_ino != path.stat().st_ino:
            raise InputError(f"{output}: another {command} has just finished there; run the command again")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        lock.release()
