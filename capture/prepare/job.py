"""The prepare job: conversations -> a prepared dataset and its draft-vocabulary map.

One process per core runs, each with the tokenizer's own threads off. Rows are written in the order in which they were
read, so that the output is the same for any number of workers. The output is renamed to its name when it is complete.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from draftcache.capture.prepare.chat.encoding import one_thread_per_process
from draftcache.capture.prepare.chat.rendering import check_template_compiles
from draftcache.capture.prepare.chat.settings import ChatSettings
from draftcache.capture.prepare.chat.tokenizer_files import (
    ChatTemplate,
    TokenizerFiles,
    load_tokenizer,
)
from draftcache.capture.prepare.chunks import (
    Chunk,
    ChunkResult,
    ChunkWorker,
    RowSettings,
    read_chunks,
    run_in_worker,
    start_worker,
)
from draftcache.capture.prepare.draft_vocabulary import build_vocab_map, coverage_curve, coverage_table
from draftcache.capture.prepare.notes import Notes
from draftcache.capture.prepare.rows.roles import RoleMap
from draftcache.capture.prepare.rows.sources import describe_sources, refuse_shared_files
from draftcache.capture.prepare.sample_check import check_sample, job_template
from draftcache.capture.prepare.split_writer import SplitWriter
from draftcache.capture.prepare.token_dataset import TokenDataset, is_prepared
from draftcache.capture.prepare.token_dataset_writer import DatasetWriter, check_output
from draftcache.store.common.errors import InputError, WorkerError
from draftcache.store.common.files import hash_json
from draftcache.store.common.progress import progress_bar
from draftcache.store.common.worker_pool import WorkerPool
from draftcache.store.format.vocab_map import VOCAB_MAP_NAME

SAVE_SECONDS = 10.0
"""How often the job makes durable what it has finished, from where the same command goes on."""
_ROWS_VERSION = 2
"""Part of a job's hash: it changes when the same rows would become other ids or masks."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """The inputs and settings of prepare, and how it runs."""

    tokenizer: Path
    output: Path
    splits: dict[str, list[Path]]  # counted into the vocabulary map
    held_out: dict[str, list[Path]]  # only reported
    max_length: int = 32768  # tokens kept of each conversation
    draft_vocab_size: int | None = None
    drop_duplicates: bool = False  # keep only the first of equal conversations, over all splits in their order
    chat_template: Path | None = None
    allow_template_difference: bool = False
    chat: ChatSettings = field(default_factory=ChatSettings)
    trust_remote_code: bool = False
    roles: tuple[str, ...] = ()  # NAME=ROLE, names of roles beside the built-in ones
    workers: int = 0  # 0: one per core
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if not self.splits:
            raise InputError("prepare: expected at least one NAME=INPUT that is not held out, found none")
        if both := sorted(set(self.splits) & set(self.held_out)):
            raise InputError(f"prepare: expected other names for held-out splits, found {both} in both")
        for flag, value, least in (
            ("--max-length", self.max_length, 2),
            ("--draft-vocab-size", 1 if self.draft_vocab_size is None else self.draft_vocab_size, 1),
            ("--workers", self.workers, 0),
        ):
            if value < least:
                raise InputError(f"{flag}: expected at least {least}, found {value}")
        RoleMap.with_names(self.roles)

    @property
    def role_map(self) -> RoleMap:
        """The names of roles, built-in and given."""
        return RoleMap.with_names(self.roles)

    @property
    def all_splits(self) -> dict[str, list[Path]]:
        """Counted splits, then held-out ones."""
        return {**self.splits, **self.held_out}

    @property
    def row_settings(self) -> RowSettings:
        """What decides which ids and masks a row becomes."""
        return RowSettings(
            max_length=self.max_length,
            chat=self.chat,
            allow_template_difference=self.allow_template_difference,
            roles=self.role_map,
        )


@dataclass(frozen=True, kw_only=True)
class PrepareResult:
    """The finished dataset's manifest; `reused` says that the same job had made it before."""

    manifest: dict[str, Any]
    reused: bool

    @property
    def quarantined_rows(self) -> int:
        """Rows in quarantine, over all splits."""
        return sum(record["quarantined_rows"] for record in self.manifest["splits"].values())


def prepare(config: PrepareConfig) -> PrepareResult:
    """Run the job. Rows that cannot be used go to quarantine; InputError is raised for all else that is refused."""
    with one_thread_per_process():
        files, tokenizer = load_tokenizer(config.tokenizer, trust_remote_code=config.trust_remote_code)
        sources = {name: describe_sources(paths) for name, paths in config.all_splits.items()}
        refuse_shared_files(sources, held_out=config.held_out)
        template = job_template(config.chat_template, files, config.all_splits, config.role_map)
        check_template_compiles(template)
        job = _job_hash(config, files, template, sources)
        if not config.overwrite and (manifest := _finished_by(config.output, job)):
            return PrepareResult(manifest=manifest, reused=True)
        check_output(config.output, overwrite=config.overwrite)
        rows = config.row_settings
        checked = check_sample(files, template, rows, tokenizer, config.all_splits)
        manifest = {
            "job": job,
            "tokenizer": {"directory": files.directory, "hash": files.hash, "files": files.files},
            "chat_template": {
                "hash": template.hash,
                "source": template.source,
                **checked,
                "settings": config.chat.as_json(),
                "stop_tokens": list(files.stop_tokens),
            },
            "versions": {name: version(name) for name in ("transformers", "tokenizers")},
            "vocab_size": files.vocab_size,
            "vocab_size_from": files.vocab_size_from,
            "max_length": config.max_length,
        }
        with DatasetWriter(
            config.output, job=job, overwrite=config.overwrite, drop_duplicates=config.drop_duplicates
        ) as dataset:
            splits, notes = _tokenise(config, dataset, (files, template, rows))
            dataset.write_tokenizer(files.backend_json)
            manifest["notes"] = notes.as_json()
            manifest["splits"] = {
                name: {"held_out": name in config.held_out, "sources": sources[name], **split.record()}
                for name, split in splits.items()
            }
            counts = {name: split.counts for name, split in splits.items()}
            manifest["coverage_curve"] = coverage_curve(
                {name: counts[name] for name in config.splits}, {name: counts[name] for name in config.held_out}
            )
            manifest["draft_vocabulary"] = _write_vocab_map(config, dataset, splits)
            return PrepareResult(manifest=dataset.commit(manifest), reused=False)


def _tokenise(
    config: PrepareConfig, dataset: DatasetWriter, arguments: tuple[TokenizerFiles, ChatTemplate, RowSettings]
) -> tuple[dict[str, SplitWriter], Notes]:
    splits = dataset.open_splits(config.all_splits, arguments[0].vocab_size)
    notes, finished = Notes.from_json(dataset.progress.notes), dataset.progress.chunks
    workers = config.workers or os.cpu_count() or 1
    chunks = (
        chunk
        for name, paths in config.all_splits.items()
        for index, path in enumerate(paths)
        for chunk in read_chunks(name, index, path)
    )
    rows = sum(split.totals["rows"] for split in splits.values())
    quarantined = sum(split.quarantined.total() for split in splits.values())
    if finished and config.progress:
        print(f"prepare: an earlier run left {rows:,} rows, going on behind them", file=sys.stderr)
    saved = time.monotonic()
    tokens = sum(split.totals["tokens"] for split in splits.values())
    with progress_bar(unit="tok", unit_scale=True, desc="prepare", disable=not config.progress, initial=tokens) as bar:
        results = _in_order(islice(chunks, finished, None), workers, arguments)
        for done, result in enumerate(results, start=finished + 1):
            split = splits[result.split]
            notes.merge(result.notes)
            for rejection in result.rejections:
                split.reject(rejection)
            if len(result.conversations):
                split.append(result.token_ids, result.loss_mask, result.conversations)
            rows, quarantined = rows + len(result.conversations), quarantined + len(result.rejections)
            bar.update(len(result.token_ids))
            bar.set_postfix(rows=rows, quarantined=quarantined, refresh=False)
            if time.monotonic() - saved >= SAVE_SECONDS:
                dataset.save_progress(done, notes, splits)
                saved = time.monotonic()
    for split in splits.values():
        split.close()
    for name, split in splits.items():
        _refuse_empty(name, split)
    return splits, notes


def _in_order(chunks: Iterator[Chunk], workers: int, arguments: tuple[Any, ...]) -> Iterator[ChunkResult]:
    """Results in the order of `chunks`, of which at most a few per worker are read ahead."""
    if workers == 1:
        yield from map(ChunkWorker(*arguments).run, chunks)
        return
    pending: deque[Any] = deque()
    try:
        with WorkerPool(workers, start_worker, arguments) as pool:
            for chunk in chunks:
                pending.append(pool.submit(run_in_worker, chunk))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
    except BrokenProcessPool as exc:
        raise WorkerError(
            "prepare: a worker process died (killed, or out of memory); the same command goes on from what was "
            "finished; try fewer --workers"
        ) from exc


def _refuse_empty(name: str, split: SplitWriter) -> None:
    if split.totals["rows"]:
        return
    if dropped := split.dropped_rows:
        raise InputError(
            f"split {name}: expected at least one row to keep, found that --drop-duplicates drops all that are usable "
            f"(equal to rows of: {dropped}); leave the split out, or take other rows for it"
        )
    if split.first_rejection is None:
        raise InputError(f"split {name}: expected at least one row, found none")
    hint = ""
    if set(split.quarantined) <= {"no-assistant-tokens"}:
        hint = ". No row has an answer of the assistant's: are the roles right (--role NAME=ROLE)?"
    raise InputError(
        f"split {name}: expected at least one usable row, found {split.quarantined.total()}, all set aside "
        f"({dict(split.quarantined)}); the first: {split.first_rejection}{hint}"
    )


def _write_vocab_map(
    config: PrepareConfig, dataset: DatasetWriter, splits: dict[str, SplitWriter]
) -> dict[str, Any] | None:
    if config.draft_vocab_size is None:
        return None
    counts = {name: splits[name].counts for name in config.splits}
    held_out = {name: splits[name].counts for name in config.held_out}
    vocab_map = build_vocab_map(counts, config.draft_vocab_size)
    vocab_map.save(dataset.partial / VOCAB_MAP_NAME)
    rows = coverage_table(counts, vocab_map, held_out)
    return {"size": len(vocab_map), "hash": vocab_map.hash, "coverage": [row.as_json() for row in rows]}


def _job_hash(
    config: PrepareConfig,
    files: TokenizerFiles,
    template: ChatTemplate,
    sources: dict[str, list[dict[str, Any]]],
) -> str:
    """A hash that is equal for jobs that make the same dataset: file names and the number of workers do not count."""
    inputs = [
        [name, name in config.held_out, [source["xxh3_128"] for source in sources[name]]] for name in config.all_splits
    ]
    settings = [
        config.max_length,
        config.draft_vocab_size,
        config.drop_duplicates,
        files.vocab_size,
        files.special_tokens,
        files.stop_tokens,
        config.chat.as_json(),
        config.allow_template_difference,
        sorted(config.role_map.added.items()),
    ]
    return hash_json([_ROWS_VERSION, files.hash, template.hash, settings, inputs])


def _finished_by(output: Path, job: str) -> dict[str, Any] | None:
    if not output.is_dir() or not is_prepared(output):
        return None
    try:
        manifest = TokenDataset.open(output).manifest
    except InputError:  # it is damaged or of another version, and `check_output` refuses it
        return None
    return manifest if manifest.get("job") == job else None
