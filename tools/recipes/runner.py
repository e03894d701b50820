"""Runs the steps of a recipe that are not done, one process each, so that memory and signals are each step's own."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from draftcache.store.common.child_processes import end_with_parent
from draftcache.store.common.errors import InputError
from draftcache.store.common.failures import FAILED
from draftcache.store.common.locks import take_lock
from draftcache.tools.recipes.auto import decide
from draftcache.tools.recipes.checks import Checked
from draftcache.tools.recipes.records import Records
from draftcache.tools.recipes.steps import Step

Run = Callable[[Step, list[str]], int]
"""Runs a step's words and returns the exit code."""

_GOES_ON = ("prepare", "generate", "capture")
"""Commands whose exit code 1 means that they are done, with rows quarantined."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How one step went."""

    name: str
    command: str
    output: str
    ran: bool
    """False where the step was done before."""
    exit_code: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as JSON values."""
        return {**vars(self), "seconds": round(self.seconds, 1)}


def run_steps(checked: Checked, folder: Path, run: Run) -> list[Outcome]:
    """Run the steps that are not done. Returns the outcomes, of which the last one may have failed.

    A step that ends with another code than 0, or 1 for quarantined rows, is the last one. Raises InputError where
    another process runs steps in this folder, or an output was made from something else.
    """
    lock = take_lock(folder / ".lock")
    if lock is None:
        raise InputError(f"{folder}: expected no other run at work there, found one; wait, or give another --output")
    try:
        return list(_run_steps(checked, folder, run))
    finally:
        lock.release()


def _run_steps(checked: Checked, folder: Path, run: Run) -> Iterator[Outcome]:
    records, above = Records(folder), dict[str, Step]()
    for item in checked.values():
        step, started = item.step, time.monotonic()
        words = step.words(decide(step, above).values)
        code = records.exit_code(step, words, above)
        ran = code is None
        if code is None:
            print(f"\n[{step.name}]\n$ {typed(step.as_typed(words))}", flush=True)
            records.begin(step, words, above)
            code = run(step, words)
            if code == 0 or (code == 1 and step.command in _GOES_ON):
                records.finish(step, code)
        else:
            print(f"[{step.name}] was done before: {step.output}", flush=True)
        above[step.name] = step
        yield Outcome(
            name=step.name,
            command=step.command,
            output=step.output,
            ran=ran,
            exit_code=code,
            seconds=time.monotonic() - started,
        )
        if code not in (0, 1) or (code == 1 and step.command not in _GOES_ON):
            return


def typed(words: list[str]) -> str:
    """Return words as a shell's line."""
    return " ".join(word if word.startswith("$(") else shlex.quote(word) for word in words)


def run_process(step: Step, words: list[str], *, as_json: bool = False) -> int:
    """Run a step in a process of its own and return its exit code.

    With `as_json`, what it prints goes to stderr. SIGTERM is passed on to it; Ctrl-C reaches it by itself.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    process = subprocess.Popen(
        step.launched(words), stdout=2 if as_json else None, preexec_fn=end_with_parent(signal.SIGTERM)
    )
    with _passed_on(process):
        code = process.wait()
    if code >= 0:
        return FAILED if step.processes > 1 and code == 1 else code  # torchrun's 1 stands for any failure of a rank
    if -code in (signal.SIGTERM, signal.SIGINT):
        return 128 - code
    name = signal.Signals(-code).name
    print(
        f"draftcache run: [{step.name}] was ended by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}; the "
        "same command goes on from what was saved",
        file=sys.stderr,
    )
    return FAILED


@contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Pass SIGTERM on to the process, and leave SIGINT to it, which a terminal sends to both."""

    def pass_on(number: int, _frame: FrameType | None) -> None:
        process.send_signal(number)

    previous: Mapping[signal.Signals, Any] = {
        number: signal.signal(number, handler)
        for number, handler in ((signal.SIGTERM, pass_on), (signal.SIGINT, lambda *_: None))
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def format_outcomes(outcomes: list[Outcome], left: list[str]) -> str:
    """Format how the steps went, one per line, then those that did not run."""
    width = max(len(one.name) for one in outcomes)
    lines = [f"  {one.name:<{width}}  {_state(one):<14} {one.seconds:>9,.1f} s  {one.output}" for one in outcomes]
    return "\n".join([*lines, *(f"  {name:<{width}}  not run" for name in left)])


def _state(outcome: Outcome) -> str:
    if outcome.exit_code not in (0, 1):
        return f"exit code {outcome.exit_code}"
    quarantined = ", quarantine" if outcome.exit_code == 1 else ""
    return ("done" if outcome.ran else "was done") + quarantined
