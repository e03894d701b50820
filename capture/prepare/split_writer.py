"""Write one split of a prepared dataset, row by row, so that a killed job can go on from what it had finished."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash

from draftcache.capture.prepare.duplicates import DuplicateTable
from draftcache.capture.prepare.rows.rejections import Rejection
from draftcache.capture.prepare.statistics import SplitStatistics
from draftcache.capture.prepare.token_dataset import CONVERSATION_DTYPE, QUARANTINE, conversation_hash

_ROWS_AT_ONCE = 1024


class LeftoverError(Exception):
    """Raised where the files that an ended job left are not as its record of progress says."""


class _GrowingArray:
    """A one-dimensional .npy file whose length is known only when it is closed."""

    def __init__(self, path: Path, dtype: np.dtype[Any], length: int = 0) -> None:
        """Start the file; with `length`, go on behind that many values. Raises LeftoverError where it has fewer."""
        self.dtype = dtype
        self.length = length
        header = self._header()
        self._header_bytes = len(header)
        if not length:
            self.file: IO[bytes] = path.open("wb")
            self.file.write(header)
            return
        end = len(header) + length * dtype.itemsize
        if not path.is_file() or path.stat().st_size < end:
            raise LeftoverError(path)
        self.file = path.open("r+b")
        self.file.truncate(end)
        self.file.seek(end)

    def append(self, values: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(values, self.dtype).tobytes())
        self.length += len(values)

    def stored(self, first: int, last: int) -> np.ndarray:
        """The values first .. last - 1 as they are on the disk; what is appended next still goes to the end."""
        self.file.seek(self._header_bytes + first * self.dtype.itemsize)
        values = np.frombuffer(self.file.read((last - first) * self.dtype.itemsize), self.dtype)
        self.file.seek(0, os.SEEK_END)
        return values

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        # numpy pads headers so that the first axis can grow in place; a header of another size would shift the data.
        header = self._header()
        if len(header) != self._header_bytes:
            raise AssertionError("numpy wrote a .npy header of another size")
        self.file.seek(0)
        self.file.write(header)
        self.file.close()

    def _header(self) -> bytes:
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.length,),
        }
        text = io.BytesIO()
        np.lib.format.write_array_header_1_0(text, header)
        return text.getvalue()


class SplitWriter:
    """Appends conversations to one split; `record()` are its totals for the manifest.

    `duplicates` is the table of all splits of the dataset, which are written one after the other.
    """

    def __init__(
        self, path: Path, vocab_size: int, duplicates: DuplicateTable, state: dict[str, Any] | None = None
    ) -> None:
        """Start the split; with a `state` of `save`, go on behind it: everything is counted again from the files.

        Raises LeftoverError where the files are not what they were when `save` returned that state.
        """
        path.mkdir(parents=True, exist_ok=state is not None)
        state = state or {"rows": 0, "tokens": 0, "quarantine_bytes": 0}
        self.path = path
        self.counts = np.zeros(vocab_size, np.int64)
        self.quarantined: Counter[str] = Counter()
        self.first_rejection: Rejection | None = None
        self.totals: Counter[str] = Counter()
        self._statistics = SplitStatistics()
        self._duplicates = duplicates
        self._files = ExitStack()
        with ExitStack() as opened:  # closed where the leftovers are not what they should be
            self._token_ids = _GrowingArray(path / "token_ids.npy", np.dtype("<u4"), state["tokens"])
            opened.callback(self._token_ids.file.close)
            self._loss_mask = _GrowingArray(path / "loss_mask.npy", np.dtype("?"), state["tokens"])
            opened.callback(self._loss_mask.file.close)
            self._conversations = _GrowingArray(path / "conversations.npy", CONVERSATION_DTYPE, state["rows"])
            opened.callback(self._conversations.file.close)
            self._quarantine = (path / QUARANTINE).open("r+b" if state["quarantine_bytes"] else "wb")
            opened.callback(self._quarantine.close)
            self._records, self._rejections = xxhash.xxh3_128(), xxhash.xxh3_128()
            self._take_over(state)
            self._files = opened.pop_all()

    def _take_over(self, state: dict[str, Any]) -> None:
        """Count what an earlier run wrote. Raises LeftoverError where it is not what its state says."""
        for token_ids, loss_mask, conversations in self._stored_rows(state["rows"]):
            self._count(token_ids, loss_mask, conversations)
        for rejection in self._stored_rejections(state["quarantine_bytes"]):
            self._count_rejection(rejection)
        if "hash" in state and state["hash"] != self._hash():
            raise LeftoverError(self.path)

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
        self._count_kept(token_ids, loss_mask, conversations)
        self._records.update(conversations.tobytes())
        self._token_ids.append(token_ids)
        self._loss_mask.append(loss_mask)
        self._conversations.append(conversations)

    def _count(self, token_ids: np.ndarray, loss_mask: np.ndarray, conversations: np.ndarray) -> None:
        """Count rows that an earlier run has kept."""
        self._duplicates.keep(self.path.name, conversations["content_hash"].tolist())
        self._count_kept(token_ids, loss_mask, conversations)

    def _count_kept(self, token_ids: np.ndarray, loss_mask: np.ndarray, conversations: np.ndarray) -> None:
        lengths = conversations["tokens"]
        self.totals["rows"] += len(conversations)
        self.totals["tokens"] += int(lengths.sum())
        self.totals["untruncated_tokens"] += int(conversations["untruncated_tokens"].sum())
        self.totals["truncated_rows"] += int((conversations["untruncated_tokens"] > lengths).sum())
        self.totals["loss_tokens"] += int(conversations["loss_tokens"].sum())
        self._statistics.add(loss_mask, lengths)
        self.counts += np.bincount(token_ids[loss_mask], minlength=len(self.counts))

    def reject(self, rejection: Rejection) -> None:
        """Record a row that cannot be used."""
        self._count_rejection(rejection)
        line = json.dumps(rejection.as_json(), ensure_ascii=True).encode() + b"\n"
        self._rejections.update(line)
        self._quarantine.write(line)

    def _count_rejection(self, rejection: Rejection) -> None:
        self.first_rejection = self.first_rejection or rejection
        self.quarantined[rejection.reason] += 1
        self._statistics.reject(rejection)

    def _stored_rows(self, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield what an earlier run stored, some rows at a time. Raises LeftoverError where a row is not as it was."""
        token = 0
        for first in range(0, rows, _ROWS_AT_ONCE):
            conversations = self._conversations.stored(first, min(first + _ROWS_AT_ONCE, rows))
            lengths = conversations["tokens"]
            ends = token + np.cumsum(lengths)
            if (lengths < 1).any() or int(ends[-1]) > self._token_ids.length:
                raise LeftoverError(self.path)
            token_ids = self._token_ids.stored(token, int(ends[-1]))
            loss_mask = self._loss_mask.stored(token, int(ends[-1]))
            for end, length, digest in zip(ends - token, lengths, conversations["content_hash"].tolist(), strict=True):
                if conversation_hash(token_ids[end - length : end], loss_mask[end - length : end]) != digest:
                    raise LeftoverError(self.path)
            self._records.update(conversations.tobytes())
            yield token_ids, loss_mask, conversations
            token = int(ends[-1])

    def _stored_rejections(self, size: int) -> Iterator[Rejection]:
        stored = self._quarantine.read(size) if size else b""
        self._rejections.update(stored)
        self._quarantine.truncate(size)
        self._quarantine.seek(size)
        for line in stored.splitlines():
            try:
                yield Rejection(**json.loads(line))
            except (ValueError, TypeError) as exc:
                raise LeftoverError(self.path) from exc

    def _hash(self) -> str:
        """Of the records and rejections so far; a record has the hash of its ids and mask."""
        return f"{self._records.hexdigest()}{self._rejections.hexdigest()}"

    def save(self) -> dict[str, Any]:
        """Make what was written so far durable, and return the state from which a later job goes on."""
        for array in (self._token_ids, self._loss_mask, self._conversations):
            array.sync()
        self._quarantine.flush()
        os.fsync(self._quarantine.fileno())
        return {
            "rows": self._conversations.length,
            "tokens": self._token_ids.length,
            "quarantine_bytes": self._quarantine.tell(),
            "hash": self._hash(),
        }

    def close(self) -> None:
        """Complete and close the files."""
        for array in (self._token_ids, self._loss_mask, self._conversations):
            array.close()
        np.save(self.path / "token_counts.npy", self.counts, allow_pickle=False)
        self._quarantine.close()

    def abandon(self) -> None:
        """Close the files without completing them; after `close` this does nothing."""
        self._files.close()

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
