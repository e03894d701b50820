"""The version of the code that runs, and its commit where it runs from a git checkout."""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path


def code_version() -> str:
    """Return draftcache's version. It needs no installed package: the code may run from a copied tree."""
    return str(sys.modules[__name__.partition(".")[0]].__version__)


@cache
def code_commit() -> str:
    """Return the checkout's commit, with a `+` if tracked files differ from it; `unknown` outside a checkout."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)  # else it is installed below somebody else's checkout
        head = _git("rev-parse", "--short=12", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*arguments: str) -> str:
    folder = Path(__file__).resolve().parent
    return subprocess.run(
        ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True, timeout=20
    ).stdout.strip()
