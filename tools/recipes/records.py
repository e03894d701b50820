"""What a recipe's folder knows of its steps: which are done, by the evidence of their outputs.

`steps/NAME.json` is written before a step starts. It holds the step's words, the content that it reads of the steps
above (by hash) and of other files (by size and time), and whether an output was there before. A step is done if its
output is complete, and was made by the same words from the same content.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any

from draftcache.store.common.errors import DraftcacheError, InputError
from draftcache.store.common.files import hash_file, hash_json, read_json, write_json
from draftcache.tools.config_file import actions_of
from draftcache.tools.recipes.steps import Step

_REWRITTEN = ("eval", "report", "vocab", "prepare", "generate")
"""Commands that make their output anew, or refuse to by its content."""
_PATHS = ("inputs", "held_out", "store", "bigram_store", "more_vocab_maps", "prompts")
"""Flags that name what is read, beside those whose type is a path."""


def content_of(step: Step) -> str | None:
    """Return a hash that names the content of a step's output, or None where that is not complete."""
    path = Path(step.output)
    try:
        if step.command in ("capture", "convert"):
            return _store_content(step.output)
        if step.command == "train":
            return _run_content(path)
        if step.command in ("prepare", "generate"):
            return hash_file(path / "manifest.json") if (path / "manifest.json").is_file() else None
        if path.is_file():
            return hash_file(path)
        return hash_json(sorted((one.name, one.stat().st_size) for one in path.iterdir())) if path.is_dir() else None
    except (DraftcacheError, OSError, KeyError, TypeError):
        return None


def _store_content(location: str) -> str | None:
    from draftcache.store.reader import StoreReader

    return StoreReader(location).manifest.hash  # it opens finished stores only


def _run_content(output: Path) -> str | None:
    states = sorted((output / "checkpoints").glob("step_*/state.json"))
    return hash_file(states[-1]) if states and read_json(states[-1])["finished"] is True else None


class Records:
    """The records of a recipe's steps, in the folder of its outputs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "steps"

    def exit_code(self, step: Step, words: Sequence[str], above: Mapping[str, Step]) -> int | None:
        """Return the exit code with which a step was done, 0 or 1, or None where it has to run."""
        record, wanted = self._read(step), self._key(step, words, above)
        if record is None or any(record.get(name) != value for name, value in wanted.items()):
            return None
        if content_of(step) is None or not (record["finished"] or record["fresh"]):
            return None
        return int(record["code"])

    def begin(self, step: Step, words: Sequence[str], above: Mapping[str, Step]) -> None:
        """Note that a step starts. Raises InputError where its output was made from another content of a step above."""
        record, wanted = self._read(step), self._key(step, words, above)
        if record is not None and _exists(step) and step.command not in _REWRITTEN:
            for name, content in wanted["reads"].items():
                if record["reads"].get(name, content) != content:
                    raise InputError(
                        f"{step.output}: expected an output of [{step.name}] that was made from what [{name}] has made "
                        f"now, found one made from something else; remove it, or give another --output"
                    )
        # Going on with the same work keeps what is known of its beginning.
        same = record is not None and all(record.get(name) == value for name, value in wanted.items())
        fresh = record["fresh"] if same and record is not None else content_of(step) is None
        self._write(step, wanted | {"fresh": fresh, "finished": False, "code": 0})

    def finish(self, step: Step, code: int) -> None:
        """Note that a step ended with an exit code of 0 or 1."""
        record = self._read(step)
        assert record is not None
        self._write(step, record | {"finished": True, "code": code})

    def _key(self, step: Step, words: Sequence[str], above: Mapping[str, Step]) -> dict[str, Any]:
        return {
            "words": list(words),
            "reads": {name: content_of(above[name]) for name in step.uses},
            "files": {path: _identity(Path(path)) for path in sorted(_outside(step, above))},
        }

    def _path(self, step: Step) -> Path:
        return self.folder / f"{step.name}.json"

    def _read(self, step: Step) -> dict[str, Any] | None:
        if not self._path(step).is_file():
            return None
        found = read_json(self._path(step))
        names = {"words", "reads", "files", "fresh", "finished", "code"}
        if not isinstance(found, dict) or not names <= found.keys():
            raise InputError(f"{self._path(step)}: expected the record of a step, found something else; remove it")
        return found

    def _write(self, step: Step, record: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._path(step), record)


def _exists(step: Step) -> bool:
    return "://" in step.output or Path(step.output).exists()


def _outside(step: Step, above: Mapping[str, Step]) -> Iterator[str]:
    """Yield the files and folders that a step reads and that no step makes."""
    made = [step.output, *(above[name].output for name in step.uses)]
    actions = actions_of(step.parser)
    paths = {name for name, action in actions.items() if action.type is Path} | set(_PATHS)
    for text in _texts({name: value for name, value in step.values.items() if name in paths}):
        for part in {text, text.partition("=")[2]} - {""}:
            if not any(part.startswith(path) for path in made):
                yield from ([part] if Path(part).exists() else glob(part, recursive=True))  # noqa: PTH207


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _identity(path: Path) -> Any:
    """Return size and time of a file, or of the files right in a folder, as JSON values."""
    files = sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]
    return [[one.name, one.stat().st_size, one.stat().st_mtime_ns] for one in files]
