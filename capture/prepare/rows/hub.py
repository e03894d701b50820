"""Datasets of the Hugging Face hub, by the parquet files into which the hub itself converts them."""

from __future__ import annotations

import re
from pathlib import Path

from draftcache.store.common.errors import InputError

_NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::(?:(?P<config>[\w.-]+)/)?(?P<split>[\w.-]+))?")
_REVISION = "refs/convert/parquet"
_DEFAULT_SPLIT = "train"


def hub_name(text: str) -> tuple[str, str | None, str] | None:
    """Repository, configuration (None: the only one) and split of `ORG/NAME[:[CONFIG/]SPLIT]`; None for other text."""
    match = _NAME.fullmatch(text)
    return (match["repo"], match["config"], match["split"] or _DEFAULT_SPLIT) if match else None


def download_dataset(text: str) -> list[Path]:
    """Download the parquet files of one split into the hub's cache, and return them in the order of their rows.

    Raises InputError where `text` is no name on the hub, where the hub cannot be reached, and where the split is not
    there or is one of several configurations.
    """
    named = hub_name(text)
    if named is None:
        raise InputError(f"{text!r}: expected ORG/NAME[:[CONFIG/]SPLIT], a dataset of the Hugging Face hub")
    repo, config, split = named
    import huggingface_hub

    pattern = f"{config or '*'}/{split}/*.parquet"
    try:
        folder = huggingface_hub.snapshot_download(
            repo, repo_type="dataset", revision=_REVISION, allow_patterns=pattern
        )
    except (OSError, ValueError) as exc:  # the base classes of all errors of the hub and of its connections
        raise InputError(
            f"{text}: expected a file, a folder, a glob or a hub dataset, found nothing of that name here, and the "
            f"hub did not give the dataset: {type(exc).__name__}: {_first_line(exc)}"
        ) from exc
    files = sorted(Path(folder).glob(pattern))
    configs = sorted({file.parts[-3] for file in files})
    if not files:
        raise InputError(
            f"{text}: expected {pattern} among the parquet files of the hub's dataset, found none: the split may have "
            f"another name, or be too large for the hub to convert. Then `hf download {repo} --repo-type dataset "
            "--local-dir FOLDER` and give FOLDER"
        )
    if len(configs) > 1:
        raise InputError(f"{text}: expected one configuration, found {configs}: give {repo}:CONFIG/{split}")
    return files


def _first_line(exc: BaseException) -> str:
    return next(iter(str(exc).strip().splitlines()), "no reason given")
