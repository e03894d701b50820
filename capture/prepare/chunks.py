"""The work of prepare's worker processes: from a chunk of rows to packed ids, masks and records.

A chunk holds about a mebibyte of rows for any number of workers, so that the output depends on the input alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from draftcache.capture.prepare.chat.encoding import ChatTokenizer
from draftcache.capture.prepare.chat.learned_rows import LearnedRow, LearnedText
from draftcache.capture.prepare.chat.rendering import Renderer
from draftcache.capture.prepare.chat.settings import ChatSettings
from draftcache.capture.prepare.chat.template_check import template_difference
from draftcache.capture.prepare.chat.tokenizer_files import ChatTemplate, TokenizerFiles
from draftcache.capture.prepare.notes import Notes
from draftcache.capture.prepare.rows.files import Row, read_sized_rows
from draftcache.capture.prepare.rows.forms import BUILT_IN_ROLES, ChatRow, parse_row
from draftcache.capture.prepare.rows.rejections import Rejection, RowRejectedError
from draftcache.capture.prepare.rows.roles import RoleMap
from draftcache.capture.prepare.rows.token_rows import TokenRow
from draftcache.capture.prepare.token_dataset import CONVERSATION_DTYPE, conversation_hash

# Large enough that passing a chunk to a process takes little beside encoding it (about 0.3 s), and small enough that
# the encodings of one chunk (about 150 bytes per token) take some tens of megabytes at most.
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Rows of one file of one split with their numbers, in order, and the rejections that reading them made."""

    split: str
    file_index: int
    file: str
    lines: list[tuple[int, Row]]
    rejections: list[Rejection] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ChunkResult:
    """Usable conversations packed flat, as uint32 [t], bool [t] and CONVERSATION_DTYPE [n], and the rejected rows."""

    split: str
    token_ids: np.ndarray
    loss_mask: np.ndarray
    conversations: np.ndarray
    rejections: list[Rejection]
    notes: Notes


def read_chunks(split: str, file_index: int, path: Path) -> Iterator[Chunk]:
    """Cut one file into chunks of about CHUNK_BYTES, by the sizes of its rows alone."""
    lines: list[tuple[int, Row]] = []
    rejections: list[Rejection] = []
    size = 0
    for item in read_sized_rows(path):
        if isinstance(item, Rejection):
            rejections.append(item)
            continue
        number, row, row_bytes = item
        lines.append((number, row))
        size += row_bytes
        if size >= CHUNK_BYTES:
            yield Chunk(split=split, file_index=file_index, file=str(path), lines=lines)
            lines, size = [], 0
    if lines or rejections:
        yield Chunk(split=split, file_index=file_index, file=str(path), lines=lines, rejections=rejections)


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """What decides which ids and masks a row becomes, beside the tokenizer and the template."""

    max_length: int  # tokens kept of a conversation
    chat: ChatSettings = field(default_factory=ChatSettings)
    allow_template_difference: bool = False
    roles: RoleMap = BUILT_IN_ROLES


class ChunkWorker:
    """Turns chunks into results with one tokenizer and one template."""

    def __init__(self, files: TokenizerFiles, template: ChatTemplate, settings: RowSettings) -> None:
        self.tokenizer = ChatTokenizer(files, template, settings.chat)
        self.vocab_size = files.vocab_size
        self.settings = settings
        own = files.own_template
        variables = self.tokenizer.renderer.variables
        self._own = None if own in (None, template) else Renderer(own, variables, settings.chat.date)

    def run(self, chunk: Chunk) -> ChunkResult:
        """Parse, render, encode, truncate and check every line of the chunk."""
        rejections, notes = list(chunk.rejections), Notes()
        rows: list[tuple[int, np.ndarray, np.ndarray]] = []
        texts: list[tuple[int, LearnedText]] = []
        for number, line in chunk.lines:
            try:
                row = parse_row(line, self.settings.roles)
                if isinstance(row, TokenRow):
                    rows.append((number, row.token_ids, row.loss_mask))
                    continue
                learned = self._learned(row)
            except RowRejectedError as exc:
                rejections.append(exc.at(chunk.file, number))
                continue
            texts += [(number, text) for text in learned.texts]
            notes.merge(learned.notes, f"{chunk.file}:{number}: ")
        encoded = self.tokenizer.encode([text for _, text in texts])
        rows += [(number, ids, mask) for (number, _), (ids, mask) in zip(texts, encoded, strict=True)]
        kept, records = [], []
        for number, token_ids, loss_mask in sorted(rows, key=lambda row: row[0]):
            try:
                ids, mask, record = self._checked(token_ids, loss_mask)
            except RowRejectedError as exc:
                rejections.append(exc.at(chunk.file, number))
                continue
            kept.append((ids, mask))
            records.append((*record, number, chunk.file_index))
        return ChunkResult(
            split=chunk.split,
            token_ids=np.concatenate([np.zeros(0, np.uint32), *(ids for ids, _ in kept)]),
            loss_mask=np.concatenate([np.zeros(0, np.bool_), *(mask for _, mask in kept)]),
            conversations=np.array(records, dtype=CONVERSATION_DTYPE),
            rejections=sorted(rejections, key=lambda rejection: rejection.line),
            notes=notes,
        )

    def _learned(self, row: ChatRow) -> LearnedRow:
        learned = self.tokenizer.learned(row)
        if self._own is not None:
            normalised = self.tokenizer.conversations.normalised(row)
            difference = template_difference(self.tokenizer.renderer, self._own, normalised)
            if difference is not None:
                if not self.settings.allow_template_difference:
                    raise RowRejectedError(
                        "template-difference",
                        expected="the text of the tokenizer's own template; correct the given template, or go on with "
                        "--allow-template-difference",
                        found=difference,
                    )
                learned.notes.add("text that differs from the tokenizer's own template, as allowed", difference)
        return learned

    def _checked(
        self, token_ids: np.ndarray, loss_mask: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, tuple[np.void, int, int, int, int]]:
        """Ids, mask and record fields of one conversation, truncated. Raises RowRejectedError where it is unusable."""
        untruncated, max_length = len(token_ids), self.settings.max_length
        if not loss_mask.any():
            raise RowRejectedError(
                "no-assistant-tokens",
                expected="at least one assistant token",
                found=f"none in {untruncated} tokens",
            )
        if (largest := int(token_ids.max())) >= self.vocab_size:
            raise RowRejectedError(
                "token-id-out-of-vocabulary",
                expected=f"token ids below {self.vocab_size}",
                found=str(largest),
            )
        first = int(loss_mask.argmax())
        token_ids, loss_mask = token_ids[:max_length], loss_mask[:max_length]
        if not loss_mask.any():
            raise RowRejectedError(
                "no-assistant-tokens-after-truncation",
                expected=f"an assistant token among the first {max_length}",
                found=f"the first one at position {first} of {untruncated}",
            )
        digest = np.void(conversation_hash(token_ids, loss_mask))
        return token_ids, loss_mask, (digest, 0, len(token_ids), untruncated, int(loss_mask.sum()))


_worker: ChunkWorker | None = None


def start_worker(files: TokenizerFiles, template: ChatTemplate, settings: RowSettings) -> None:
    """Initialise a worker process."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = ChunkWorker(files, template, settings)


def run_in_worker(chunk: Chunk) -> ChunkResult:
    """Run one chunk in a process that `start_worker` has initialised."""
    if _worker is None:
        raise RuntimeError("start_worker was not called in this process")
    return _worker.run(chunk)
