"""The checks of one engine: what runs in which order, and what each verdict is.

Plain greedy decoding by the engine gives the texts. They are captured, drafts are trained on the store, counted and
exported, and the engine decodes the same prompts with each. Everything is kept in one directory, so that an interrupted
check goes on where it stopped.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from draftcache.capture.verifier.weights import weights_fingerprint
from draftcache.draft_train.drafts.block.served import ANCHOR_FIELD_SINCE
from draftcache.draft_train.drafts.serving_target import FORMS, ServingTarget
from draftcache.store.common.errors import InputError, WorkerError
from draftcache.store.common.files import read_json, write_json
from draftcache.store.reader import StoreReader
from draftcache.tools.engine_check import drafts, judging
from draftcache.tools.engine_check.comparison import arithmetic_of
from draftcache.tools.engine_check.engine import Engine, engine_versions
from draftcache.tools.engine_check.near_ties import margins_at
from draftcache.tools.engine_check.own_proposals import one_thread
from draftcache.tools.engine_check.states import check_states
from draftcache.tools.engine_check.subjects import (
    DRAFTS,
    IF_NAMED,
    ON_GPU_ONLY,
    OWN,
    Subject,
    demo_subject,
    llama_subject,
    own_subject,
    positions_of,
)
from draftcache.tools.engine_check.verdicts import Verdict

CHECKS = ("text", "steps", "proposals", "wrong", "states")
_OF_DRAFTS = {"text", "steps", "proposals", "wrong"}
BATCH = 8
"""Requests at once on a GPU."""
_ROOM = 16
"""Positions beyond the longest text and its proposals: close to the last one engines propose nothing."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to check, and where to work."""

    vllm: str
    work: Path
    verifier: Path | None = None
    run: Path | None = None
    store: str | None = None
    drafts: Sequence[str] = ()
    checks: Sequence[str] = CHECKS
    form: str = FORMS[0]
    """Form of the exports, one of `serving_target.FORMS`."""
    prompts: int = 208
    tokens: int = 64
    draft_tokens: int = 5
    dtype: str = "float32"
    device: str = "auto"
    engine_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        given = {"--verifier": self.verifier, "--run": self.run, "--store": self.store}
        if missing := [name for name, value in given.items() if value is None]:
            if len(missing) < len(given):
                raise InputError(
                    f"expected {', '.join(given)} together or none of them, {' and '.join(missing)} missing"
                )
        elif self.drafts:
            raise InputError("--drafts: expected it without --run, whose draft is the one to check, found both")
        for name, value, least in (
            ("prompts", self.prompts, 1), ("tokens", self.tokens, 8), ("draft-tokens", self.draft_tokens, 1),
        ):  # fmt: skip
            if value < least:
                raise InputError(f"--{name}: expected at least {least}, found {value}")


@dataclass(frozen=True)
class Outcome:
    """The verdicts of a run, and what they were found on."""

    verdicts: list[Verdict]
    versions: dict[str, Any]
    on_gpu: bool


def run_checks(settings: Settings, found: Callable[[Outcome], None]) -> Outcome:
    """Run the checks, and call `found` after each draft with the verdicts so far.

    Raises InputError for what does not fit, WorkerError where plain decoding fails.
    """
    versions = engine_versions(settings.vllm)
    on_gpu = versions["device"] != "cpu"
    version = versions["engine"].split()[-1]
    names = _drafts_of(settings, on_gpu, version)
    print(", ".join(f"{name} {value}" for name, value in versions.items()), file=sys.stderr, flush=True)
    check = EngineCheck(settings, _subject_of(settings, on_gpu), on_gpu, version)
    _require_same(settings, check.subject, versions)
    outcome = Outcome([], versions, on_gpu)
    for verdicts in check.run(names):
        outcome.verdicts.extend(verdicts)
        found(outcome)
    return outcome


def _drafts_of(settings: Settings, on_gpu: bool, version: str) -> list[str]:
    if settings.run is not None:
        return [OWN]
    wrong = [name for name in settings.drafts if name in ON_GPU_ONLY and not on_gpu]
    if wrong:
        raise InputError(f"--drafts: expected drafts that vLLM serves on a CPU, found {', '.join(wrong)}: leave it out")
    left_out: tuple[str, ...] = IF_NAMED if on_gpu else IF_NAMED + ON_GPU_ONLY
    if settings.form != FORMS[0] and not ServingTarget(engine="vllm", version=version).since(ANCHOR_FIELD_SINCE):
        left_out += ("dspark",)  # whose anchor predicts, which older versions don't read there
    return list(settings.drafts) or [name for name in DRAFTS if name not in left_out]


def _subject_of(settings: Settings, on_gpu: bool) -> Subject:
    if settings.verifier is not None and settings.run is not None and settings.store is not None:
        room = settings.tokens + settings.draft_tokens + _ROOM
        return own_subject(settings.verifier, settings.run, settings.store, settings.prompts, room)
    if on_gpu:
        return demo_subject(settings.prompts)
    return llama_subject(settings.work / "verifier", settings.prompts)


def _require_same(settings: Settings, subject: Subject, versions: dict[str, Any]) -> None:
    """Note what the work directory is for. Raises InputError where it holds the phases of another check."""
    file = settings.work / "settings.json"
    names = ("store", "prompts", "tokens", "draft_tokens", "dtype", "engine_options")
    ours = {name: getattr(settings, name) for name in names} | {
        "verifier": weights_fingerprint(subject.verifier),
        "run": None if subject.checkpoint is None else str(subject.checkpoint.absolute()),
        "versions": versions,
    }
    if file.exists():
        theirs = read_json(file)
        if differing := [name for name, value in ours.items() if theirs.get(name) != value]:
            raise InputError(
                f"--work {settings.work}: expected the phases of this check, found those of one with other "
                f"{', '.join(differing)}; remove it, or choose another"
            )
    write_json(file, ours)


class EngineCheck:
    """One check of an engine on a verifier with its drafts."""

    def __init__(self, settings: Settings, subject: Subject, on_gpu: bool, version: str) -> None:
        """`version` is the engine's."""
        self.settings, self.subject, self.on_gpu, self.version = settings, subject, on_gpu, version
        self.prompts = [list(prompt) for prompt in subject.prompts]
        self.draft_tokens = settings.draft_tokens
        if subject.checkpoint is not None and (whole := drafts.proposed_tokens(subject.checkpoint)):
            self.draft_tokens = whole
        self.engine = Engine(
            settings.vllm, settings.work / "engine", self._options(), batched=on_gpu, one_thread=subject.one_thread
        )
        self.arithmetic = arithmetic_of(settings.dtype, on_gpu=on_gpu)
        self._plain: list[list[int]] | None = None

    def _options(self) -> dict[str, Any]:
        """Return the options of `vllm.LLM` that all starts share: nothing that makes equal inputs differ."""
        longest = max(map(len, self.prompts)) + self.settings.tokens + self.draft_tokens + _ROOM
        length = max(512, -(-longest // 64) * 64)
        if (most := positions_of(self.subject.verifier)) is not None:
            length = min(length, most)
        requests = BATCH if self.on_gpu else 1
        shared = {
            "dtype": self.settings.dtype, "max_model_len": length, "max_num_seqs": requests, "enforce_eager": True,
            "max_num_batched_tokens": max(8192, requests * length),  # no prompt is read in pieces
            "enable_prefix_caching": False, "disable_log_stats": False, "seed": 0,
        }  # fmt: skip
        return shared | ({"gpu_memory_utilization": 0.3} if self.on_gpu else {}) | self.settings.engine_options

    def run(self, names: Sequence[str]) -> Iterator[list[Verdict]]:
        """Yield the verdicts of each draft, and of the states, that are asked for. They are printed on stderr too.

        Where the engine fails with a draft or with hidden states, that is a verdict too, and the other checks go on.
        """
        asked = set(self.settings.checks)
        with one_thread() if self.subject.one_thread else nullcontext():
            parts: dict[str, Callable[[], list[Verdict]]] = {}
            if asked & _OF_DRAFTS:
                store = self._store()
                parts |= {name: partial(self._check_draft, name, store, asked) for name in names}
            if "states" in asked:
                parts["states"] = self._check_states
            for name, check in parts.items():
                try:
                    made = check()
                except WorkerError as exc:
                    made = [Verdict(name, "engine", False, str(exc))]
                print("\n".join(item.line() for item in made), file=sys.stderr, flush=True)
                yield made

    def _check_states(self) -> list[Verdict]:
        directory = self.settings.work / "states"
        directory.mkdir(parents=True, exist_ok=True)
        verdict = check_states(
            self.engine, self.subject.verifier, self.subject.layers, directory,
            device=self._device(), reference=self.settings.dtype,
        )  # fmt: skip
        return [verdict]

    def _device(self) -> str:
        return self.settings.device if self.subject.on_device else "cpu"

    @property
    def plain(self) -> list[list[int]]:
        """The engine's plain greedy answers."""
        if self._plain is None:
            beyond = f", {self.subject.beyond_window} of them beyond the draft's window of {self.subject.window}"
            doing = f"plain decoding of {len(self.prompts)} prompts{beyond if self.subject.window else ''}"
            answer = self.engine.answers("plain", doing, self.subject.verifier, self.prompts, self.settings.tokens)
            self._plain = [item["token_ids"] for item in answer["outputs"]]
        return self._plain

    @property
    def traces(self) -> list[tuple[list[int], list[int]]]:
        """Prompts with the engine's plain answers."""
        return list(zip(self.prompts, self.plain, strict=True))

    def _store(self) -> StoreReader:
        settings = self.settings
        return drafts.captured(
            self.traces, self.subject, settings.work / "traces", dtype=settings.dtype, device=settings.device
        )

    def _check_draft(self, name: str, store: StoreReader, asked: set[str]) -> list[Verdict]:
        work, device = self.settings.work, self.settings.device
        checkpoint = self.subject.checkpoint or drafts.trained(
            name, self.subject, store, work / f"run-{name}", draft_tokens=self.draft_tokens, device=device
        )
        counted = drafts.offline_count(checkpoint, store, work / f"count-{name}.json", draft_tokens=self.draft_tokens)
        name = name if self.settings.form == FORMS[0] else f"{name}-{self.settings.form}"
        draft = drafts.exported(
            checkpoint, work / f"draft-{name}", form=self.settings.form, version=self.version,
            verifier=self.subject.verifier, dtype=self.settings.dtype,
        )  # fmt: skip
        right = self._served(name, f"{name}, decoding with the export", draft)
        found = []
        if "text" in asked:
            found.append(judging.judge_text(name, right, counted))
        if "steps" in asked:
            found.append(judging.judge_steps(name, right, counted, own=self.subject.checkpoint is not None))

        def proposals(served: judging.Served) -> Verdict:
            return judging.judge_proposals(name, served, self.traces, store, checkpoint, arithmetic=self.arithmetic)

        if "proposals" in asked:
            found.append(proposals(right))
        if "wrong" in asked:
            wrong, mistake = drafts.wrong_export(draft, work / f"wrong-{name}")
            served = self._served(f"{name}-wrong", f"{name}, decoding with a wrong export ({mistake})", wrong)
            shown = partial(proposals, served) if "proposals" in asked else None
            found.append(judging.judge_wrong(name, right, served, mistake, shown))
        return found

    def _served(self, name: str, doing: str, draft: Path) -> judging.Served:
        """Return what the engine does with an export: beside the verifier, or in the speculators form by itself."""
        served, options = draft, {}
        if self.settings.form == FORMS[0]:
            served = self.subject.verifier
            options["speculative_config"] = {
                "method": drafts.method_of(draft),
                "model": str(draft.absolute()),
                "num_speculative_tokens": self.draft_tokens,
            }
        answer = self.engine.answers(name, doing, served, self.prompts, self.settings.tokens, **options)
        differing = judging.differences(self.plain, answer)
        prefixes = {number: [*self.prompts[number], *self.plain[number][:at]] for number, at in differing.items()}
        margins = margins_at(self.subject.verifier, prefixes, dtype=self.settings.dtype, device=self._device())
        return judging.Served.of(answer, margins, arithmetic=self.arithmetic, draft_tokens=self.draft_tokens)
