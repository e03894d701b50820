"""Eagle3, DFlash and DSpark drafts of one verifier, on equal data: acceptance, draft time and the speed-up of both.

`python -m draftcache.tools.bench.drafts --verifier DIR --dataset PREPARED --layers A,B,C --train-split S --eval-split V
--work DIR --output FILE [--seeds 3] [--jobs 1] [--device cuda] [--only eagle3-1,dspark-3] [--train KEY=VALUE]` captures
a store, trains each case with every seed, and evaluates all of them on the same batches, by `draftcache capture`,
`sweep` and `eval` as child processes, `--jobs` at a time; the same command goes on where it was. Then it times drafts
and verifier, alone on the device. Cases are `eagle3-1`, and `dflash-` and `dspark-` with 1, 3 and 5 layers.

All cases have the same conversations, epochs, batches and window, a block of 8 slots or 6 unrolled steps, and the heads
and widths that --train says (the defaults fit the demo's verifier). Loss, decay and Markov rank are those that each
architecture is published with. Each case has the learning rate of `--learning-rates` with which its seed 0 did best on
the held-out split, so that its acceptance is a little optimistic there, by the same rule for all. `--train KEY=VALUE`
sets what all share, and `--train DRAFT.KEY=VALUE` what one architecture has, such as `dspark.markov_rank=128`.

Metrics of a case, with K of 3, 5 and 7 draft tokens:

- `acceptance_length@K` is the mean over seeds on all conversations of the held-out split, in tokens per verify step,
  and `half_width@K` that of its 95 % interval by Student's t. A seed draws weights and order, so `difference@K` is the
  mean of the paired differences to `eagle3-1`, with `difference_half_width@K`.
- `draft_parameters` are trained; `draft_parameters_read@K` are the weights that a proposal reads, each as often as it
  does.
- `draft_ms@K` is the time of one whole proposal (parts/draft_timing.py), `draft_ms@K,batch=16` that of 16 sequences: in
  bf16 from a CUDA graph on a GPU, in float32 on a CPU. `verify_ms@K` of the case `verifier` is the verifier's time for
  K + 1 tokens behind 512 in its cache, by transformers; K = 0 is plain decoding. The unit says how it was measured: a
  model that no graph can hold has the sum of its kernels' times.
- `speedup@K` is predicted: acceptance_length / (1 + draft_ms / verify_ms). It takes a verify step of K + 1 tokens to
  cost what a step of one does, which `verify_ms@0` shows, and leaves out all that an engine does besides.

`--table` prints a Markdown table of an --output file and does nothing else. A picture is written beside the file, where
matplotlib (the extra `plot`) is installed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from draftcache.store.common.device import use_device
from draftcache.store.common.errors import DraftcacheError, InputError
from draftcache.store.common.failures import describe_failure, exit_code_of
from draftcache.store.common.files import read_json, write_json
from draftcache.tools.bench.ablations import device_name
from draftcache.tools.bench.parts.ablation_bench import Bench, Setup, add_flags, settings_of, setup_of
from draftcache.tools.bench.parts.ablation_jobs import Jobs
from draftcache.tools.bench.parts.draft_cases import CASES, REFERENCE, SHARED, split_settings, trained
from draftcache.tools.bench.parts.draft_picture import draw, table
from draftcache.tools.bench.parts.rows import paired_means
from draftcache.tools.result_rows import report, result_row, some_of

TOKENS = (3, 5, 7)
BATCHES = (1, 16)
CONTEXT = 512
VERIFIER = "verifier"
_RATES = "5e-4,1e-3,2e-3,4e-3"

Rows = list[dict[str, Any]]
Trials = Mapping[str, Sequence[dict[str, Any]]]
Times = Mapping[str, tuple[float, str]]
"""By metric, milliseconds and how they were measured."""


def main() -> int:
    """Compare the chosen cases, or print the table of an earlier comparison. Returns the exit code."""
    try:
        arguments = parse_arguments(sys.argv[1:])
        if arguments.table:
            print(table(read_json(arguments.output), TOKENS))
            return 0
        shared, own = split_settings(settings_of(arguments.train, "--train"))
        setup = setup_of(arguments, SHARED, train=SHARED | shared)
        return measure(setup, arguments.only, arguments.learning_rates, own, arguments.jobs, arguments.output)
    except DraftcacheError as exc:
        print(describe_failure(exc), file=sys.stderr)
        return exit_code_of(exc)


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Return the flags of this benchmark. With --table, of the required ones only --output must be there."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_flags(parser, required="--table" not in words)
    parser.add_argument(
        "--learning-rates", type=_rates, default=_rates(_RATES), metavar="RATE,RATE", help=f"({_RATES})"
    )
    parser.add_argument("--only", type=some_of(CASES), default=list(CASES), metavar="CASE,CASE")
    parser.add_argument("--table", action="store_true", help="print a Markdown table of the rows in --output")
    arguments = parser.parse_args(words)
    if arguments.output is None:
        raise InputError("--table: expected --output with the file of an earlier comparison, found none")
    return arguments


def _rates(text: str) -> list[float]:
    return [float(rate) for rate in text.split(",")]


def measure(
    setup: Setup, names: Sequence[str], rates: Sequence[float], own: Mapping[str, Any], jobs: int, output: Path
) -> int:
    """Train, evaluate and time these cases, and write the rows. Returns 0, or the exit code of a case that failed."""
    bench, device, started = Bench(setup, Jobs(jobs, setup.work / "logs")), device_name(setup.device), time.monotonic()
    trials: dict[str, list[dict[str, Any]]] = {}
    code = 0
    order = [name for name in CASES if name in names]
    with ThreadPoolExecutor(max_workers=len(order)) as pool, ExitStack() as stack:
        futures = {
            name: pool.submit(trained, bench.of_family(at), CASES[name], rates, own) for at, name in enumerate(order)
        }
        stack.callback(bench.jobs.stop)  # after Ctrl-C no further command begins
        for name, future in futures.items():
            try:
                trials[name] = future.result()
            except DraftcacheError as exc:
                print(f"{name}: {describe_failure(exc)}", file=sys.stderr, flush=True)
                code = exit_code_of(exc)
        if trials:
            evaluate(bench, trials)
    print(f"{len(trials)} cases trained and evaluated after {time.monotonic() - started:.0f} s", file=sys.stderr)
    rows = acceptance_rows(trials, device)
    write_json(output, rows)  # a run that is cut short while it times leaves these
    rows += timing_rows(setup, bench.store(), trials, device) if trials else []
    write_json(output, rows)
    report(rows, None)
    _draw(rows, output.with_suffix(".png"))
    return code


def evaluate(bench: Bench, trials: Trials) -> None:
    """Put into every trial its acceptance length by draft tokens, `lengths`, all from the same batches."""
    every = [trial for of_case in trials.values() for trial in of_case]
    for count in TOKENS:
        lengths = bench.compared(f"{count}-tokens", bench.store(), [trial["run"] for trial in every], count)
        for trial, length in zip(every, lengths, strict=True):
            trial.setdefault("lengths", {})[count] = length


def acceptance_rows(trials: Trials, device: str) -> Rows:
    """Return the rows of acceptance: means over seeds, and paired differences to `eagle3-1` where it was trained."""
    rows: Rows = []
    for case, of_case in trials.items():
        found: dict[str, tuple[float, str]] = {}
        for count in TOKENS:
            reference = trials[REFERENCE] if case != REFERENCE and REFERENCE in trials else None
            compared = None if reference is None else [trial["lengths"][count] for trial in reference]
            lengths = [trial["lengths"][count] for trial in of_case]
            means = paired_means("acceptance_length", lengths, compared, f"@{count}")
            found |= {metric: (value, "tokens/step") for metric, value in means.items()}
        found |= {
            "learning_rate": (of_case[0]["learning_rate"], "of AdamW"),
            "trials": (len(of_case), "trials"),
            "optimizer_steps": (of_case[0]["steps"], "steps"),
        }
        rows += [result_row(case, metric, value, unit, device) for metric, (value, unit) in found.items()]
    return rows


def timing_rows(setup: Setup, store: Path, trials: Trials, device: str) -> Rows:
    """Return the rows of sizes, times and predicted speed-ups. A verifier that can't be timed leaves out the last."""
    import torch

    on = use_device(setup.device)
    dtype = torch.bfloat16 if on.type == "cuda" else torch.float32
    drafts = {case: draft_figures(store, of_case[0]["run"], on, dtype) for case, of_case in trials.items()}
    verify: Times = {}
    try:
        verify = dict(verifier_times(setup.verifier, on, dtype))
    except Exception as exc:  # transformers' code, of any model
        print(f"{VERIFIER}: not timed: {type(exc).__name__}: {str(exc)[:300]}", file=sys.stderr, flush=True)
    rows = [result_row(VERIFIER, metric, value, f"ms, {how}", device) for metric, (value, how) in verify.items()]
    for case, of_case in trials.items():
        sizes, times = drafts[case]
        rows += [result_row(case, metric, value, "parameters", device) for metric, value in sizes.items()]
        rows += [result_row(case, metric, value, f"ms, {how}", device) for metric, (value, how) in times.items()]
        rows += [
            result_row(case, metric, value, "times plain decoding", device)
            for metric, value in speedups(of_case, times, verify).items()
        ]
    return rows


def verifier_times(directory: Path, device: Any, dtype: Any) -> Iterator[tuple[str, tuple[float, str]]]:
    """Yield the metrics `verify_ms@K`, and each one's milliseconds with how they were measured."""
    from draftcache.tools.bench.parts.verifier_timing import VerifierClock

    clock = VerifierClock(directory, device, dtype)
    for batch in BATCHES:
        for count in (0, *TOKENS):
            yield named("verify_ms", count, batch), clock.step_ms(count + 1, sequences=batch, context=CONTEXT)


def draft_figures(store: Path, run: Path, device: Any, dtype: Any) -> tuple[dict[str, int], Times]:
    """Return a trained draft's numbers of parameters, and the times of its proposals."""
    import torch

    from draftcache.draft_train.checkpoint import load_draft, load_state, resolve_checkpoint
    from draftcache.draft_train.data.frozen import FrozenWeights
    from draftcache.store.reader import StoreReader
    from draftcache.tools.bench.parts.draft_timing import draft_step, in_dtype
    from draftcache.tools.bench.parts.replayed import timed_ms

    path = resolve_checkpoint(run)
    draft = load_draft(path, load_state(path), device)
    sizes = {"draft_parameters": sum(value.numel() for value in draft.model.parameters())}
    model, embeddings = (
        in_dtype(draft.model, dtype),
        FrozenWeights.load(StoreReader(store), device).embed_tokens.to(dtype),
    )
    shape = draft.shape
    target_ids = torch.arange(shape.draft_vocab_size, device=device) * shape.vocab_size // shape.draft_vocab_size
    times = {}
    for batch in BATCHES:
        for count in TOKENS:
            step = draft_step(model, embeddings, target_ids, count=count, sequences=batch, context=CONTEXT)
            times[named("draft_ms", count, batch)] = timed_ms(step, device)
            sizes[f"draft_parameters_read@{count}"] = step.parameters_read()
    return sizes, times


def speedups(trials: Sequence[Mapping[str, Any]], draft: Times, verify: Times) -> dict[str, float]:
    """Return the predicted speed-ups of a case, by metric, where the verifier was timed."""
    found = {}
    for batch in BATCHES:
        for count in TOKENS:
            if (metric := named("verify_ms", count, batch)) in verify:
                length = statistics.fmean(trial["lengths"][count] for trial in trials)
                share = draft[named("draft_ms", count, batch)][0] / verify[metric][0]
                found[named("speedup", count, batch)] = length / (1 + share)
    return found


def named(metric: str, count: int, batch: int) -> str:
    """Return the name of a metric for a number of draft tokens and of sequences."""
    return f"{metric}@{count}" if batch == 1 else f"{metric}@{count},batch={batch}"


def _draw(rows: Rows, path: Path) -> None:
    try:
        draw(rows, path, TOKENS)
    except ImportError:
        print(f"{path}: not drawn: matplotlib is not installed (the extra plot)", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
