"""Which causal-LM types of the installed transformers can be captured: a tiny random model of each, end to end.

Every type gets one outcome. `works`: the store holds what plain transformers computes. `refused`: capture says in one
line that it can't (exit code 2). `failed`: anything else that is no store. `wrong`: a store that differs.
`unbuildable`: there is no tiny model of it here, so it does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is to be downloaded; transformers reads it when imported

import torch
import transformers

from draftcache.capture.job import launch, worker_job  # noqa: F401  (forked processes start with them)
from draftcache.store.common.files import hash_bytes, hash_json, write_json
from draftcache.tools.bench.parts.forked import Limits
from draftcache.tools.bench.parts.tiny_verifiers import UnbuildableError, model_types, save_tiny_model, tiny_config
from draftcache.tools.bench.parts.verifier_tables import families_table, outcome_table
from draftcache.tools.bench.parts.verifier_trial import (
    OUTCOMES,
    UNBUILDABLE,
    WORKS,
    Trial,
    try_type,
    write_dataset,
)
from draftcache.tools.commands import capture  # noqa: F401  (these too)
from draftcache.tools.result_rows import cpu_name, report, result_row, some_of

_REASON = 160  # characters of a reason in a row's unit


def main() -> None:
    """Try the chosen types, and print and write what was found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--details", type=Path, metavar="FILE", help="write every trial with its whole reason as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table by families")
    parser.add_argument("--only", type=some_of(model_types()), default=model_types(), metavar="TYPE,TYPE")
    parser.add_argument("--jobs", type=int, default=2, help="types at a time, one core each (%(default)s)")
    parser.add_argument("--seconds", type=float, default=120.0, help="limit of each step of a type (%(default)s)")
    parser.add_argument("--memory-gb", type=float, default=6.0, help="limit of each step of a type (%(default)s)")
    parser.add_argument(
        "--cache", type=Path, metavar="DIRECTORY", help="keep trials there, and take over those of the same code"
    )
    arguments = parser.parse_args()
    limits = Limits(seconds=arguments.seconds, memory_gb=arguments.memory_gb)
    trials = run_trials(arguments.only, jobs=arguments.jobs, limits=limits, cache=arguments.cache)
    print(outcome_table(trials))
    if arguments.details:
        write_json(arguments.details, [trial.as_json() for trial in trials])
    if arguments.markdown:
        arguments.markdown.write_text(families_table(trials), encoding="utf-8")
    report(result_rows(trials), arguments.output)


def run_trials(types: Sequence[str], *, jobs: int, limits: Limits, cache: Path | None = None) -> list[Trial]:
    """Try every type in a process of its own, `jobs` at a time, and return the trials in the order of `types`."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="draftcache-verifiers-") as directory:
        root = Path(directory)
        dataset = write_dataset(root / "prepared")
        save_tiny_model("llama", root / "first")  # what transformers builds once, every forked process then has
        results = cache or root / "results"
        results.mkdir(parents=True, exist_ok=True)

        def one(model_type: str) -> None:
            path, key = results / f"{model_type}.json", _key(model_type)
            if _cached(path, key) is None:
                trial = try_type(model_type, dataset, root / model_type, limits)
                write_json(path, {"key": key, "trial": trial.as_json()})

        _run_forked(types, one, jobs)
        return [_read(results / f"{model_type}.json") for model_type in types]


def result_rows(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return a row per type, 1 where it works, whose unit is the outcome and the reason; then the counts."""
    device = f"{cpu_name()}; transformers {transformers.__version__}, torch {torch.__version__}"
    rows = []
    for trial in trials:
        unit = f"{trial.outcome}: {trial.reason}"[:_REASON] if trial.reason else trial.outcome
        rows.append(result_row(trial.model_type, "works", float(trial.outcome == WORKS), unit, device))
    counts = Counter(trial.outcome for trial in trials)
    rows += [result_row("summary", outcome, float(counts[outcome]), "types", device) for outcome in OUTCOMES]
    built = len(trials) - counts[UNBUILDABLE]
    share = counts[WORKS] / built if built else 0.0
    return [*rows, result_row("summary", "share", share, "of the types that were built", device)]


def _run_forked(types: Sequence[str], one: Callable[[str], None], jobs: int) -> None:
    """Call `one` for every type in forked processes; an error in one of them ends this process too."""
    running: dict[int, str] = {}
    left = list(types)
    done = 0
    while left or running:
        if left and len(running) < jobs:
            model_type = left.pop(0)
            sys.stdout.flush()
            process = os.fork()
            if process == 0:
                _end_with(one, model_type)
            running[process] = model_type
            continue
        process, status = os.wait()
        model_type = running.pop(process)
        if status:
            raise RuntimeError(f"{model_type}: expected a trial, found that its process ended with status {status}")
        done += 1
        print(f"{done}/{len(types)} {model_type}", file=sys.stderr, flush=True)


def _end_with(one: Callable[[str], None], model_type: str) -> None:
    code = 1
    try:
        one(model_type)
        code = 0
    finally:
        if code:
            import traceback

            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)


def _key(model_type: str) -> str:
    """A hash of what decides a trial: the tiny configuration and the sources of capture, the store and the check."""
    package = Path(__file__).parents[2]
    parts = [
        package / f"tools/bench/parts/{name}.py"
        for name in ("forked", "random_dataset", "verifier_checks", "verifier_trial")
    ]
    sources = [*sorted((package / "capture").rglob("*.py")), *sorted((package / "store").rglob("*.py")), *parts]
    try:
        config = tiny_config(model_type).to_json_string(use_diff=False)
    except UnbuildableError as exc:
        config = str(exc)
    hashes = [hash_bytes(path.read_bytes()) for path in sources]
    return hash_json([hashes, config, transformers.__version__, torch.__version__, platform.machine()])


def _cached(path: Path, key: str) -> Trial | None:
    if not path.is_file():
        return None
    stored = json.loads(path.read_text(encoding="utf-8"))
    return _read(path) if stored["key"] == key else None


def _read(path: Path) -> Trial:
    return Trial(**json.loads(path.read_text(encoding="utf-8"))["trial"])


if __name__ == "__main__":
    main()
