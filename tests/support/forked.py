"""Programs as processes forked from one that has imported torch, transformers and draftcache, which takes seconds.

Signals, output and environment are their own. With GPUs, `started` forks nothing, since CUDA does not survive that.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from draftcache.tools.cli import main

CLI = ["-m", "draftcache.tools.cli"]
_IMPORTED = [
    "transformers.models.nemotron_h.modeling_nemotron_h", "transformers.models.llama.modeling_llama",
    "draftcache.capture.job.launch", "draftcache.capture.job.local_workers", "draftcache.capture.job.worker_job",
    "draftcache.draft_train.trainer", "draftcache.draft_train.evaluate", "draftcache.draft_train.export",
]  # fmt: skip
"""Installed modules only: Python 3.11's server does not know the tests' own directory, and says nothing of what it
can't import."""


class Forked:
    """`python WORDS` under these variables, where WORDS are `CLI` and a command's, or a script and its words."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        self._said = [_empty_file(), _empty_file()]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTED)  # the server is begun by the first process
        self._process = context.Process(target=_run, args=(list(words), dict(environment), self._said))
        self._process.start()

    def poll(self) -> int | None:
        """Return the exit code, or the negative number of the signal that ended it; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None and self._process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    def ended(self, timeout: float) -> tuple[int, str, str]:
        """Wait for the end, and return exit code, stdout and stderr."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self.send_signal(signal.SIGKILL)
        assert self._process.exitcode is not None, f"expected the process to end within {timeout:.0f} s"
        out, errors = (path.read_text() for path in self._said)
        for path in self._said:
            path.unlink()
        return self._process.exitcode, out, errors


class Executed(subprocess.Popen[str]):
    """A process of its own interpreter, in the form of `Forked`."""

    def __init__(self, words: Sequence[str], environment: Mapping[str, str]) -> None:
        pipe = subprocess.PIPE
        super().__init__([sys.executable, *words], stdout=pipe, stderr=pipe, text=True, env=environment)

    def ended(self, timeout: float) -> tuple[int, str, str]:
        """Wait for the end, and return exit code, stdout and stderr."""
        out, errors = self.communicate(timeout=timeout)
        return self.returncode, out, errors


def started(words: Sequence[str], environment: Mapping[str, str]) -> Forked | Executed:
    """Start `python WORDS` under these variables; where there are GPUs, in an interpreter of its own."""
    return Executed(words, environment) if torch.cuda.is_available() else Forked(words, environment)


def _empty_file() -> Path:
    descriptor, name = tempfile.mkstemp(prefix="said-")
    os.close(descriptor)
    return Path(name)


def _run(words: list[str], environment: dict[str, str], said: list[Path]) -> None:
    for number, path in enumerate(said, start=1):
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    if threads := environment.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))
    if words[:2] == CLI:
        sys.argv = words[1:]
        sys.exit(main(words[2:]))
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")
