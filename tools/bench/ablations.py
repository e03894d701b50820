"""What the published recipe left open: windows, modes, teachers, unroll, loss rows, order and turns, with intervals.

`python -m draftcache.tools.bench.ablations --verifier DIR --dataset PREPARED --layers A,B,C --train-split S
--eval-split V --work DIR --output FILE [--turns-input train=FILE eval=FILE] [--seeds 3] [--jobs 1] [--only window]`
captures the stores that it needs and trains a draft per case and seed, by `draftcache capture`, `sweep` and `eval` as
child processes, `--jobs` at a time; on a GPU they share it. Settings fit the demo's tiny verifier; `--train KEY=VALUE`
changes any of them, and `--capture KEY=VALUE` a flag of capture. The families and their cases:

- `window`: the draft's attention window, 64 to 512 and full.
- `mode`: the mode of the store that a draft is trained on; all are evaluated on lossless states.
- `loss-rows`: `turns` against `unshifted` (draft_train/data/loss_rows.py). `pairs_without_teacher` is the share of the
  pairs of `unshifted` that no store has a teacher for; they are left out.
- `order`: a first stage per seed on `--first-share` of `--first-split`, then `shuffle` and `bucketed` from there.
- `turns`: one JSONL file prepared with `--turns all`, `each` and `last`, at equal steps and with one held-out split.
- `unroll`: training-time-test steps 1 to 6.
- `top-k`: 8 to 256 teacher entries with a tail bucket (`tail-kl`) and renormalised, against the exact distribution.

`acceptance_length` is the mean over seeds with 5 draft tokens, on all conversations of the held-out split;
`half_width` that of its 95 % interval by Student's t. A seed draws the initial weights and the order of data, and all
cases of a family share it, so `difference` is the mean of the paired differences to the family's reference (a full
window, lossless, `turns`, `shuffle`, `all`, 6 steps, exact), with `difference_half_width`. Intervals hold for other
seeds, not for other held-out text. Rows are written after each family, and the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from draftcache.store.common.device import choose_device
from draftcache.store.common.errors import DraftcacheError
from draftcache.store.common.failures import describe_failure, exit_code_of
from draftcache.store.common.files import write_json
from draftcache.store.reader import StoreReader
from draftcache.tools.bench.parts.ablation_bench import DEFAULTS, Bench, Setup, add_flags, settings_of
from draftcache.tools.bench.parts.ablation_bench import setup_of as bench_setup
from draftcache.tools.bench.parts.ablation_families import FAMILIES, Trials, pairs_without_teacher
from draftcache.tools.bench.parts.ablation_jobs import Jobs
from draftcache.tools.bench.parts.rows import paired_means
from draftcache.tools.result_rows import cpu_name, report, result_row, some_of

UNIT = "tokens/step"
_BITS = {"bfloat16": 16, "float16": 16, "float32": 32}


def main() -> int:
    """Measure the chosen families, and write each one's rows when it is finished. Returns the exit code."""
    arguments = parse_arguments(sys.argv[1:])
    try:
        setup = setup_of(arguments)
        return measure(setup, arguments.only, arguments.jobs, arguments.output)
    except DraftcacheError as exc:
        print(describe_failure(exc), file=sys.stderr)
        return exit_code_of(exc)


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """Return the flags of this benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_flags(parser)
    parser.add_argument("--first-split", metavar="NAME", help="of the family order's first stage (the --train-split)")
    parser.add_argument("--first-share", type=float, default=0.5, help="of that split's conversations (%(default)s)")
    parser.add_argument("--turns-input", nargs=2, default=[], metavar=("train=FILE", "eval=FILE"))
    parser.add_argument("--only", type=some_of(FAMILIES), default=list(FAMILIES), metavar="FAMILY,FAMILY")
    return parser.parse_args(words)


def setup_of(arguments: argparse.Namespace) -> Setup:
    """Return what the flags choose. Raises InputError for counts out of range."""
    return bench_setup(
        arguments,
        DEFAULTS,
        first_split=arguments.first_split or arguments.train_split,
        first_share=arguments.first_share,
        turns_inputs={key: Path(value) for key, value in settings_of(arguments.turns_input, "--turns-input").items()},
    )


def measure(setup: Setup, names: Sequence[str], jobs: int, output: Path) -> int:
    """Measure these families at once, as far as `jobs` allow. Returns 0, or the exit code of a family that failed."""
    trials = setup.seeds * sum(FAMILIES[name].trials for name in names)
    print(f"{trials} drafts of {len(names)} families, {jobs} commands at once", file=sys.stderr, flush=True)
    bench, device, started = Bench(setup, Jobs(jobs, setup.work / "logs")), device_name(setup.device), time.monotonic()
    rows: dict[str, list[dict[str, Any]]] = {}
    code = 0
    with ThreadPoolExecutor(max_workers=len(names)) as pool, ExitStack() as stack:
        order = [name for name in FAMILIES if name in names]
        futures = {
            pool.submit(measure_family, bench.of_family(at), name, device): name for at, name in enumerate(order)
        }
        stack.callback(bench.jobs.stop)  # after Ctrl-C no further command begins
        for future in as_completed(futures):
            name = futures[future]
            try:
                rows[name] = future.result()
            except DraftcacheError as exc:
                print(f"{name}: {describe_failure(exc)}", file=sys.stderr, flush=True)
                code = exit_code_of(exc)
                continue
            report(rows[name], None)
            write_json(output, [row for family in order for row in rows.get(family, [])])
            print(f"{name}: done after {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return code


def measure_family(bench: Bench, name: str, device: str) -> list[dict[str, Any]]:
    """Return the rows of one family."""
    family = FAMILIES[name]
    rows = family_rows(family.measure(bench), family.reference, device)
    if name == "loss-rows":
        share = pairs_without_teacher(bench)
        rows.append(result_row("loss-rows=unshifted", "pairs_without_teacher", share, "of its pairs", device))
    if name == "mode":
        dtype = StoreReader(bench.store()).manifest.compute_dtype
        rows.append(result_row("mode", "verifier_compute_bits", _BITS[dtype], dtype, device))
    return rows


def family_rows(cases: Trials, reference: str, device: str) -> list[dict[str, Any]]:
    """Return the result rows of a family: means over seeds, and paired differences to the case `reference`."""
    rows = []
    for case, trials in cases.items():
        compared = None if case == reference else _lengths(cases[reference])
        found = paired_means("acceptance_length", _lengths(trials), compared)
        values = {metric: (value, UNIT) for metric, value in found.items()}
        values |= {"trials": (len(trials), "trials"), "optimizer_steps": (trials[0]["steps"], "steps")}
        rows += [result_row(case, metric, value, unit, device) for metric, (value, unit) in values.items()]
    return rows


def _lengths(trials: Sequence[Mapping[str, Any]]) -> list[float]:
    return [float(trial["acceptance_length"]) for trial in trials]


def device_name(device: str) -> str:
    """Return the name of the GPU or processor that `--device` chooses."""
    chosen = choose_device(device)
    if chosen.type != "cuda":
        return cpu_name()
    import torch

    return torch.cuda.get_device_name(chosen)


if __name__ == "__main__":
    sys.exit(main())
