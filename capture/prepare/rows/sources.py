"""The files of a prepare job: which ones an input names, their identity, and whether they may be used together."""

from __future__ import annotations

import glob
from collections.abc import Collection
from pathlib import Path
from typing import Any, TypeAlias

from draftcache.capture.prepare.rows.files import check_readable, holds_rows
from draftcache.capture.prepare.rows.foreign_files import READABLE
from draftcache.capture.prepare.rows.hub import download_dataset, hub_name
from draftcache.store.common.errors import InputError
from draftcache.store.common.files import hash_file, read_json

Source: TypeAlias = dict[str, Any]
"""`file`, `bytes` and `xxh3_128` of one file, as the dataset's manifest has them."""

_GLOB_CHARACTERS = "*?["


def expand_input(text: str) -> list[Path]:
    """Return the files that an input names, in the order in which their rows are read.

    An input is a file; a folder, for all files below it whose kind can be read, sorted; a glob (`**` for any folders),
    sorted; a folder of `datasets.save_to_disk`; or, where nothing of that name is here, `ORG/NAME[:SPLIT]`, a dataset
    of the Hugging Face hub, whose parquet files of SPLIT (default: train) are downloaded to the hub's cache. Hidden
    files and folders are skipped. Raises InputError where there is none, or where the input would need a choice.
    """
    path = Path(text)
    if path.is_dir():
        return _folder(path)
    if path.exists():
        return [path]
    if any(character in text for character in _GLOB_CHARACTERS):
        names = glob.glob(text, recursive=True)  # noqa: PTH207  # Path.glob takes no absolute pattern
        found = sorted(file for file in map(Path, names) if not file.is_dir())
        if not found:
            raise InputError(f"{text}: expected a glob that matches files, found none")
        return found
    if hub_name(text) is not None and not path.parent.is_dir():
        return download_dataset(text)
    raise InputError(f"{text}: expected a file, a folder or a glob, found nothing there")


def describe_sources(paths: list[Path]) -> list[Source]:
    """Return the sources of one split.

    Raises InputError for a path that is no regular file, for a kind of file that cannot be read, and where two paths
    are the same file.
    """
    seen: dict[Path, Path] = {}
    for path in paths:
        check_readable(path)
        if (other := seen.setdefault(path.resolve(), path)) is not path:
            raise InputError(f"{path}: expected each file of a split once, found it as {other} as well")
    return [{"file": str(path), "bytes": path.stat().st_size, "xxh3_128": hash_file(path)} for path in paths]


def refuse_shared_files(sources: dict[str, list[Source]], *, held_out: Collection[str]) -> None:
    """Raise InputError where a held-out split has a file that another split is trained on with, by its bytes."""
    trained = {
        source["xxh3_128"]: f"{name}={source['file']}"
        for name, files in sources.items()
        for source in files
        if name not in held_out and source["bytes"]
    }
    for name in held_out:
        for source in sources[name]:
            if (other := trained.get(source["xxh3_128"])) is not None:
                raise InputError(
                    f"--held-out {name}={source['file']}: expected rows that are not trained on, found the same bytes "
                    f"as {other}"
                )


def _folder(path: Path) -> list[Path]:
    if (path / "dataset_dict.json").is_file():
        splits = _json_of(path / "dataset_dict.json").get("splits")
        raise InputError(
            f"{path}: expected the folder of one split, found a DatasetDict with the splits {splits}: give each as "
            f"NAME={path}/SPLIT"
        )
    if _is_saved_dataset(path):
        return _saved_shards(path)
    visible = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    for file in visible:
        if file.name == "state.json" and _is_saved_dataset(file.parent):
            raise InputError(
                f"{path}: expected the folder of one split, found a saved dataset inside: give NAME={file.parent}"
            )
    if not (readable := [file for file in visible if holds_rows(file)]):
        raise InputError(f"{path}: expected a folder with files of {READABLE}; found none in {len(visible)} files")
    return readable


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def _saved_shards(path: Path) -> list[Path]:
    """The Arrow files of `datasets.save_to_disk`, in the order of its state.json. Raises InputError."""
    state = _json_of(path / "state.json")
    if mapped := [key for key in sorted(state) if key.startswith("_indices") and state[key]]:
        raise InputError(
            f"{path}/state.json: expected a dataset without an indices mapping, found {mapped}: its rows are a "
            "selection of those in the files. Call flatten_indices() and save it again"
        )
    try:
        files = [path / item["filename"] for item in state["_data_files"]]
    except (KeyError, TypeError) as exc:
        raise InputError(f"{path}/state.json: expected `_data_files` with a `filename` each, found none") from exc
    if missing := [str(file) for file in files if not file.is_file()]:
        raise InputError(f"{path}/state.json: expected all of its {len(files)} files, found none at {missing}")
    if not files:
        raise InputError(f"{path}/state.json: expected at least one file, found none")
    return files


def _json_of(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value
