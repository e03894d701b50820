"""Result rows as JSON: a case, a metric and its value, with the device, date, commit and command that it came from."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from draftcache.store.common.checkout import code_commit
from draftcache.store.common.files import write_json


def cpu_name() -> str:
    """Return the name of the processor and the number of cores that this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def result_row(case: str, metric: str, value: float, unit: str, device: str) -> dict[str, Any]:
    """Return one result as JSON values.

    Its keys are `case`, `metric`, `value`, `unit`, `device`, today's `date`, the `commit` and the running `command`.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"-m {spec.name.removesuffix('.__main__')}" if spec else Path(sys.argv[0]).name
    ranks = os.environ.get("LOCAL_WORLD_SIZE")  # torchrun sets it
    program = f"torchrun --nproc-per-node {ranks} {program}" if ranks else f"python {program}"
    return {
        "case": case,
        "metric": metric,
        "value": value,
        "unit": unit,
        "device": device,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": code_commit(),
        "command": " ".join([program, *sys.argv[1:]]),
    }


def report(rows: Sequence[dict[str, Any]], output: Path | None) -> None:
    """Print rows, and write them as one JSON array if `output` is given."""
    for row in rows:
        print(f"{row['case']:<24} {row['metric']:<12} {row['value']:>16,.4g} {row['unit']}")
    if output is not None:
        write_json(output, list(rows))


def some_of(choices: Iterable[str]) -> Callable[[str], list[str]]:
    """Return an argument type for argparse: a comma-separated list of some of `choices`."""
    names = tuple(choices)

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in names]:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(names)}, found {', '.join(unknown)}")
        return chosen

    return parse
