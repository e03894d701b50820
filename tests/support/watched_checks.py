"""Runs of `draftcache verify` in which every check of a shard is noted in a file, and may be slowed down."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.processes import ONE_THREAD

# Python imports a module of this name in every process that it starts, workers included.
_STARTED_FIRST = """
import os, time
from draftcache.store import shard_checks
check = shard_checks.check_shard
def watched(location, number, known=None, *, quick):
    with open(os.environ["CHECKS"], "a") as file:
        file.write(f"{number} {'quick' if quick else 'full'}\\n")
    time.sleep(float(os.environ["CHECK_SECONDS"]))
    return check(location, number, known, quick=quick)
shard_checks.check_shard = watched
"""


class WatchedChecks:
    """Starts `draftcache` commands that note each shard whose check begins in a file below `directory`."""

    def __init__(self, directory: Path) -> None:
        self.noted = directory / "checks"
        code = directory / "code"
        code.mkdir(parents=True)
        (code / "sitecustomize.py").write_text(_STARTED_FIRST)
        self._path = os.pathsep.join([str(code), *filter(None, [os.environ.get("PYTHONPATH")])])

    def start(self, *words: str | Path, seconds: float = 0.0) -> subprocess.Popen[str]:
        """Start a command whose checks take `seconds` more each. What was noted before is forgotten."""
        self.noted.write_text("")
        environment = {"CHECKS": str(self.noted), "CHECK_SECONDS": str(seconds), "PYTHONPATH": self._path}
        return subprocess.Popen(
            [sys.executable, "-m", "draftcache.tools.cli", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ONE_THREAD | environment,
        )

    def run(self, *words: str | Path) -> tuple[int, str, str]:
        """Run a command to its end. Returns its exit code, stdout and stderr."""
        with self.start(*words) as process:
            out, err = process.communicate()
        return process.returncode, out, err

    def checked(self, how: str = "full") -> list[int]:
        """Return the shards whose check began, ascending: those read in `full`, or the `quick` ones."""
        lines = [line.split() for line in self.noted.read_text().splitlines()]
        return sorted(int(number) for number, kind in lines if kind == how)
