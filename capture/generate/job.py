"""The generate job: prompts -> the answers of the model itself, as rows of token ids that prepare reads."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftcache.capture.generate.config import GenerateConfig
from draftcache.capture.generate.prompts import PromptReader
from draftcache.capture.generate.samples import Answer, Engine, Prompt, Sample, make_sample
from draftcache.capture.generate.traces import read_manifest, write_traces
from draftcache.capture.generate.unfinished import UnfinishedJob, different_settings, unfinished_path
from draftcache.capture.prepare.chat.encoding import one_thread_per_process
from draftcache.capture.prepare.chat.rendering import check_template_compiles
from draftcache.capture.prepare.chat.tokenizer_files import ChatTemplate, TokenizerFiles, load_tokenizer
from draftcache.capture.prepare.rows.files import read_rows
from draftcache.capture.prepare.rows.rejections import Rejection, RowRejectedError
from draftcache.capture.prepare.rows.roles import RoleMap
from draftcache.capture.prepare.rows.sources import describe_sources
from draftcache.capture.prepare.sample_check import job_template
from draftcache.capture.prepare.token_dataset_writer import exclusive
from draftcache.store.common.errors import InputError
from draftcache.store.common.progress import progress_bar

SAVE_SECONDS = 10.0
"""How often what was answered is made durable. A kill of the process loses nothing that was answered."""


@dataclass(frozen=True, kw_only=True)
class GenerateResult:
    """The finished traces' manifest; `reused` says that the same job had made them before."""

    manifest: dict[str, Any]
    reused: bool
    answered: int = 0
    """Samples that this run has got an answer to."""
    retried: int = 0
    """Requests that this run has sent again."""

    @property
    def quarantined(self) -> int:
        """Rows and samples in quarantine, over all splits."""
        return sum(split["quarantined"] for split in self.manifest["splits"].values())


def generate(config: GenerateConfig) -> GenerateResult:
    """Run the job, or go on with what an earlier run of it left.

    What can't be used goes to quarantine. Raises InputError for all else that is refused, ManifestMismatchError where
    another model answers, and ServerError where the server can't be reached or fails again and again.
    """
    with one_thread_per_process():
        files, tokenizer = load_tokenizer(config.tokenizer_directory, trust_remote_code=config.trust_remote_code)
        roles = RoleMap.with_names(config.roles)
        sources = {name: describe_sources(paths) for name, paths in config.splits.items()}
        template = job_template(config.chat_template, files, config.splits, roles)
        check_template_compiles(template)
        reader = PromptReader(files, template, config.rendering, roles=roles, continue_from=config.continue_from)
        for paths in config.splits.values():
            for path in paths:
                reader.check(tokenizer, path)
        config.output.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(config.output, "generate"), _open_engine(config, reader, files) as engine:
            settings = _settings(config, files, template, sources, engine)
            if (found := _finished_before(config, settings)) is not None:
                return GenerateResult(manifest=found, reused=True)
            with UnfinishedJob(config.output, settings, overwrite=config.overwrite) as job:
                run = _Run(config, reader, engine, job)
                run.answer_all()
                manifest = write_traces(config.output, job, settings, list(config.splits), overwrite=config.overwrite)
                job.remove()
            return GenerateResult(manifest=manifest, reused=False, answered=run.answered, retried=engine.retried)


class _Run:
    """One run of a job: it notes the samples in order, and has those answered that are not finished."""

    def __init__(self, config: GenerateConfig, reader: PromptReader, engine: Engine, job: UnfinishedJob) -> None:
        self.answered = 0
        self._config, self._reader, self._engine, self._job = config, reader, engine, job
        self._tokens = 0
        self._quarantined = 0
        self._seen: set[str] = set()

    def answer_all(self) -> None:
        """Have every sample answered. What is answered when an error or a signal ends the run stays."""
        before = len(self._job)
        if before and self._config.progress:
            print(f"generate: an earlier run left {before:,} answers, going on with the others", file=sys.stderr)
        rows = sum(1 for path in _paths(self._config) for item in read_rows(path) if not isinstance(item, Rejection))
        total = rows * self._config.samples if self._config.continue_from != "each-user" else None
        started = saved = time.monotonic()
        with progress_bar(
            total=total, initial=before, unit="row", desc="generate", disable=not self._config.progress
        ) as bar:
            for sample, outcome in self._engine.outcomes(self._samples(), lambda sample: sample.key in self._job):
                self._job.add(sample.key, self._record(sample, outcome))
                bar.update()
                rate = self._tokens / max(time.monotonic() - started, 1e-9)
                bar.set_postfix_str(
                    f"{rate:,.0f} tok/s, {self._engine.retried} retries, {self._quarantined} quarantined",
                    refresh=False,
                )
                if time.monotonic() - saved >= SAVE_SECONDS:
                    self._job.save()
                    saved = time.monotonic()

    def _record(self, sample: Sample, outcome: Answer | RowRejectedError) -> dict[str, Any]:
        if isinstance(outcome, RowRejectedError):
            self._quarantined += 1
            return {"rejected": {"reason": outcome.reason, "expected": outcome.expected, "found": outcome.found}}
        self.answered += 1
        self._tokens += len(outcome.token_ids)
        return {
            "token_ids": sample.prompt.token_ids + outcome.token_ids,
            "prompt_tokens": len(sample.prompt.token_ids),
            "prompt": sample.prompt.hash,
            "answer": self._reader.tokenizer.decode(outcome.token_ids),
            "finish_reason": outcome.finish_reason,
            "retokenised": outcome.retokenised,
        }

    def _samples(self) -> Iterator[Sample]:
        """Note all samples and unusable rows in order, and yield each sample that is not equal to an earlier one."""
        for split, path in ((split, path) for split, paths in self._config.splits.items() for path in paths):
            for item in read_rows(path):
                if isinstance(item, Rejection):
                    self._reject(split, item)
                    continue
                try:
                    prompts = self._reader.prompts(str(path), *item)
                except RowRejectedError as exc:
                    self._reject(split, exc.at(str(path), item[0]))
                    continue
                for prompt in prompts:
                    try:
                        self._require_room(prompt)
                    except RowRejectedError as exc:
                        self._reject(split, exc.at(prompt.file, prompt.line))
                        continue
                    yield from self._noted(split, prompt)

    def _require_room(self, prompt: Prompt) -> None:
        tokens, most, new = len(prompt.token_ids), self._engine.context_tokens, self._config.max_new_tokens
        if most is not None and tokens + new > most:
            raise RowRejectedError(
                "prompt-too-long",
                expected=f"a prompt of at most {most - new} tokens: the model reads {most}, of which --max-new-tokens "
                f"are {new}",
                found=f"{tokens} tokens",
            )

    def _noted(self, split: str, prompt: Prompt) -> Iterator[Sample]:
        for number in range(self._config.samples):
            sample = make_sample(prompt, number, model=self._engine.model, sampling=self._config.sampling)
            self._job.note(
                {
                    "split": split,
                    "file": prompt.file,
                    "line": prompt.line,
                    "id": prompt.row_id,
                    "turn": prompt.turn,
                    "sample": sample.number,
                    "key": sample.key,
                }
            )
            if sample.key not in self._seen:
                self._seen.add(sample.key)
                yield sample

    def _reject(self, split: str, rejection: Rejection) -> None:
        self._quarantined += 1
        self._job.note({"split": split, "rejected": rejection.as_json()})


def _paths(config: GenerateConfig) -> list[Path]:
    return [path for paths in config.splits.values() for path in paths]


def _open_engine(config: GenerateConfig, reader: PromptReader, files: TokenizerFiles) -> Engine:
    if config.server is not None:
        from draftcache.capture.generate.server import ServerEngine

        return ServerEngine(config, reader, files)
    from draftcache.capture.generate.in_process import VerifierEngine

    found = [reader.tokenizer.token_id(token) for token in files.stop_tokens]
    return VerifierEngine(config, [token for token in found if token is not None])


def _settings(
    config: GenerateConfig,
    files: TokenizerFiles,
    template: ChatTemplate,
    sources: dict[str, list[dict[str, Any]]],
    engine: Engine,
) -> dict[str, Any]:
    """What decides the output, by the names that the user knows. Where the server is does not count."""
    rendering = config.rendering
    return {
        "inputs": {name: [source["xxh3_128"] for source in found] for name, found in sources.items()},
        "model": engine.model,
        "--tokenizer": files.hash,
        "stop tokens": list(files.stop_tokens),
        "--chat-template": template.hash,
        "--template-arg": rendering.template_args,
        "--date": rendering.date,
        "--system": rendering.system,
        "--role": sorted(config.roles),
        "--continue-from": config.continue_from,
        "--samples": config.samples,
        **{"--" + name.replace("_", "-"): value for name, value in config.sampling.items()},
        "--chat": config.chat,
        "--batch-size": config.batch_size if config.server is None else None,
        "--drop-truncated": config.drop_truncated,
    }


def _finished_before(config: GenerateConfig, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of this job's output, if it is complete. Raises InputError where something else is there."""
    output = config.output
    if config.overwrite or not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    manifest = read_manifest(output)
    if manifest is None:
        raise InputError(
            f"--output {output}: expected a new path, or what the same job made, found something else or damaged "
            "traces; choose another path, or replace it with --overwrite"
        )
    if manifest["settings"] != settings:
        raise InputError(
            f"--output {output}: expected a new path, or what the same job made, found another job's: "
            f"{different_settings(manifest['settings'], settings)}; choose another path, or replace it with --overwrite"
        )
    if (left := unfinished_path(output)).exists():  # a kill came between the last two steps
        import shutil

        shutil.rmtree(left)
    return manifest
