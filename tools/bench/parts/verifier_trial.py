"""One model type tried end to end: a tiny model, captures of it by the command, and a check of every store.

Each step runs in a forked process of its own, so that a crash or a hang is one type's outcome. Two captures are made:
conversations in batches, each read in one piece (`whole`), then pieces of 64 tokens (`pieces`). Where `whole` is wrong,
conversations are also read one by one (`alone`), which tells whether batches are the cause.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from draftcache.capture.verifier.blocks import block_count
from draftcache.store.common.errors import StoreError
from draftcache.tools.bench.parts.forked import CRASHED, Ended, Limits, run_limited
from draftcache.tools.bench.parts.random_dataset import random_conversations, write_random_dataset
from draftcache.tools.bench.parts.tiny_verifiers import LAYERS, VOCAB, UnbuildableError, family_of, save_tiny_model
from draftcache.tools.bench.parts.verifier_checks import compare_store
from draftcache.tools.cli import main as command_line

WORKS, REFUSED, FAILED, WRONG, UNBUILDABLE = OUTCOMES = ("works", "refused", "failed", "wrong", "unbuildable")
LENGTHS = (200, 131, 90, 66, 64, 60, 47, 40, 33, 26, 22, 20)
"""Tokens of the conversations: longer and shorter than windows of 32 and pieces of 64, and no two alike."""
_IDS = (8, 240)
_DRAFT_VOCAB = 128
_COMMON = ("--teacher", "full", "--top-k", "16", "--mode", "float32", "--window", "0", "--device", "cpu")
_WAYS = {
    "whole": ("--batch-tokens", "512"),
    "pieces": ("--batch-tokens", "512", "--prefill-chunk", "64"),
    "alone": ("--batch-tokens", "1"),
}
_NO_MODEL = 9  # exit code of a build that says why there is none


@dataclass
class Trial:
    """What was found of one model type."""

    model_type: str
    family: str
    architecture: str
    outcome: str = UNBUILDABLE
    reason: str = ""
    ways: dict[str, str] = field(default_factory=dict)
    """Outcome and reason of each way to capture, in one text."""
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def write_dataset(path: Path) -> Path:
    """Write the prepared dataset that every type is tried on."""
    return write_random_dataset(path, LENGTHS, ids=_IDS, vocab_size=VOCAB, draft_vocab_size=_DRAFT_VOCAB)


def try_type(
    model_type: str,
    dataset: Path,
    root: Path,
    limits: Limits,
    change_model: Callable[[Path], None] = lambda path: None,
) -> Trial:
    """Build, capture and check one type below the directory `root`, which is emptied at the end.

    `change_model` is called with the model's directory between capture and check; a test changes weights there.
    """
    started = time.monotonic()
    trial = Trial(model_type, family_of(model_type), str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]))
    root.mkdir(parents=True)
    try:
        built = run_limited(lambda: _build(model_type, root / "model"), root / "build.log", limits)
        if built.code == 0:
            _try_ways(trial, dataset, root, limits, change_model)
        else:
            trial.reason = _without_paths(_why(built), root)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    trial.seconds = round(time.monotonic() - started, 1)
    return trial


def _try_ways(trial: Trial, dataset: Path, root: Path, limits: Limits, change_model: Callable[[Path], None]) -> None:
    for way in ("whole", "pieces"):
        trial.outcome, trial.reason = _capture_and_check(way, dataset, root, limits, change_model)
        if trial.outcome == WRONG and way == "whole":
            alone, reason = _capture_and_check("alone", dataset, root, limits, change_model)
            trial.ways["alone"] = f"{alone}: {reason}".removesuffix(": ")
            trial.reason = ("in batches: " if alone == WORKS else "") + trial.reason
        trial.ways[way] = f"{trial.outcome}: {trial.reason}".removesuffix(": ")
        if trial.outcome != WORKS:
            if way == "pieces":
                trial.reason = f"in pieces (works in one piece): {trial.reason}"
            return


def _capture_and_check(
    way: str, dataset: Path, root: Path, limits: Limits, change_model: Callable[[Path], None]
) -> tuple[str, str]:
    model, store, report = root / "model", root / f"store-{way}", root / f"{way}.json"
    arguments = ["--verifier", str(model), "--dataset", str(dataset), "--output", str(store)]
    arguments += ["--layers", ",".join(map(str, tapped_layers(model))), *_COMMON, *_WAYS[way]]
    captured = run_limited(lambda: command_line(["capture", *arguments]), root / f"{way}.log", limits)
    if captured.code == 2:
        return REFUSED, _without_paths(captured.last_line, root)
    if captured.code != 0:
        return FAILED, _without_paths(_why(captured), root)
    change_model(model)
    checked = run_limited(lambda: _check(store, model, report), root / f"{way}-check.log", limits)
    if checked.code != 0:
        return FAILED, "the check: " + _without_paths(_why(checked), root)
    wrong = "; ".join(json.loads(report.read_text(encoding="utf-8")))
    return (WRONG, _without_paths(wrong, root)) if wrong else (WORKS, "")


def tapped_layers(model: Path) -> Sequence[int]:
    """Return the first, the middle and the last block of a model directory."""
    from transformers import AutoConfig

    depth = block_count(AutoConfig.from_pretrained(model).get_text_config()) or LAYERS
    return sorted({0, depth // 2, depth - 1})


def _build(model_type: str, path: Path) -> int:
    try:
        save_tiny_model(model_type, path)
    except UnbuildableError as exc:
        print(exc)
        return _NO_MODEL
    return 0


def _check(store: Path, model: Path, report: Path) -> int:
    try:
        wrong = compare_store(store, model, random_conversations(LENGTHS, _IDS)).wrong()
    except StoreError as exc:
        wrong = [f"its store can't be read: {exc}"]
    report.write_text(json.dumps(wrong), encoding="utf-8")
    return 0


def _why(ended: Ended) -> str:
    """Why a process did not end with 0, in one line."""
    if ended.code is None:
        return f"it was not finished after {ended.seconds:.0f} s"
    if ended.code == _NO_MODEL:
        return ended.last_line
    if ended.code < 0:
        return f"it was ended by signal {-ended.code}"
    if ended.code == 1 and "quarantined" in ended.text:
        reasons = [line.partition(": ")[2] for line in ended.text.splitlines() if line.startswith("  quarantined")]
        return f"{len(reasons)} of {len(LENGTHS)} conversations quarantined: {(reasons or ['unknown'])[0]}"
    kind = "crash" if ended.code == CRASHED else f"exit {ended.code}"
    return f"{kind}: {ended.last_line}"


def _without_paths(text: str, root: Path) -> str:
    """One line without the times, the command's name and the temporary directory that differ from run to run."""
    text = " ".join(text.split()).replace(str(root) + os.sep, "").replace(str(root.parent) + os.sep, "")
    return re.sub(r"\d{4}-\d\d-\d\dT[\d:]+Z |draftcache capture: error: ", "", text)
