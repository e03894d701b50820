"""The first usable rows of a job, as it would write them, before it writes anything."""

from __future__ import annotations

import numpy as np

from draftcache.capture.prepare.chat.encoding import one_thread_per_process
from draftcache.capture.prepare.chat.tokenizer_files import load_tokenizer
from draftcache.capture.prepare.chunks import Chunk, ChunkWorker, read_chunks
from draftcache.capture.prepare.job import PrepareConfig
from draftcache.capture.prepare.sample_check import job_template
from draftcache.capture.prepare.token_dataset import PreparedRow

_LINES_AT_ONCE = 16


def preview(config: PrepareConfig, rows: int) -> tuple[list[PreparedRow], str]:
    """Return the first `rows` usable rows of every split, and the serialised tokenizer that made their ids.

    Rows that can't be used are passed over. Raises InputError for what prepare itself refuses as it begins.
    """
    with one_thread_per_process():
        files, _ = load_tokenizer(config.tokenizer, trust_remote_code=config.trust_remote_code)
        template = job_template(config.chat_template, files, config.all_splits, config.role_map)
        worker = ChunkWorker(files, template, config.row_settings)
        found: list[PreparedRow] = []
        for split in config.all_splits:
            found += _first_rows(config, split, worker, rows)
        return found, files.backend_json


def _first_rows(config: PrepareConfig, split: str, worker: ChunkWorker, rows: int) -> list[PreparedRow]:
    found: list[PreparedRow] = []
    for index, path in enumerate(config.all_splits[split]):
        for chunk in read_chunks(split, index, path):
            for first in range(0, len(chunk.lines), _LINES_AT_ONCE):
                part = Chunk(
                    split=split,
                    file_index=index,
                    file=chunk.file,
                    lines=chunk.lines[first : first + _LINES_AT_ONCE],
                )
                result = worker.run(part)
                ends = np.cumsum(result.conversations["tokens"])
                for record, end in zip(result.conversations, ends.tolist(), strict=True):
                    if len(found) == rows:
                        return found
                    span = slice(end - int(record["tokens"]), end)
                    found.append(
                        PreparedRow(
                            split,
                            chunk.file,
                            int(record["source_line"]),
                            result.token_ids[span],
                            result.loss_mask[span],
                            int(record["untruncated_tokens"]),
                        )
                    )
    return found
