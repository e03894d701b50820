"""The licence of a verifier, as its own files name it. Nothing is guessed: what no file names has to be looked up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from draftcache.store.common.errors import DraftcacheError
from draftcache.store.common.files import read_json

_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "COPYING")
_TITLES = {("Apache License", "Version 2.0"): "apache-2.0", ("MIT License",): "mit"}
"""First words of licence texts that name themselves, with the hub's names of these licences."""


@dataclass(frozen=True, kw_only=True)
class Licence:
    """What a verifier's files say of its licence."""

    name: str | None
    """The hub's name of it; None where no file gives one."""
    source: str
    """A sentence for people: which file names it, or that none does."""


def verifier_licence(directory: Path | None) -> Licence:
    """Return the licence that README.md, config.json or a LICENSE file of this directory names."""
    if directory is None or not directory.is_dir():
        return Licence(
            name=None, source="The verifier's files were not at hand: look its licence up before you publish."
        )
    name = _front_matter(directory / "README.md").get("license")
    if isinstance(name, str) and name:
        return Licence(name=name, source=f"The verifier's README.md names its licence: {name}.")
    try:
        config = read_json(directory / "config.json")
        named = config.get("license") if isinstance(config, dict) else None
    except (DraftcacheError, OSError, ValueError):
        named = None
    if isinstance(named, str) and named:
        return Licence(name=named, source=f"The verifier's config.json names its licence: {named}.")
    for file in (directory / name for name in _FILES):
        if file.is_file():
            return _of_text(file)
    return Licence(
        name=None, source="No file of the verifier names its licence (README.md, config.json, LICENSE): look it up."
    )


def _of_text(file: Path) -> Licence:
    """Return the licence of a LICENSE file: by its title where that is known, else its first line is quoted."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    for title, name in _TITLES.items():
        if len(lines) >= len(title) and all(text.startswith(part) for part, text in zip(title, lines, strict=False)):
            return Licence(name=name, source=f"The verifier's {file.name} is the text of {' '.join(title)}.")
    first = lines[0] if lines else "nothing"
    return Licence(name=None, source=f"The verifier's {file.name} begins with “{first}”: read it before you publish.")


def _front_matter(file: Path) -> dict[str, Any]:
    """Return the YAML between the first two lines of three dashes of a README; empty where there is none."""
    if not file.is_file():
        return {}
    before, dashes, rest = file.read_text(encoding="utf-8", errors="replace").partition("---\n")
    if before.strip() or not dashes:
        return {}
    try:
        found = yaml.safe_load(rest.partition("\n---")[0])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}
