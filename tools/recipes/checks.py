"""Checks of a whole recipe before its first step: builds every step's settings, and holds steps against one another."""

from __future__ import annotations

import importlib
import json
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftcache.store.common.errors import DraftcacheError, InputError
from draftcache.tools.cli import COMMANDS
from draftcache.tools.config_file import nearest
from draftcache.tools.recipes.auto import Known, decide, split_names
from draftcache.tools.recipes.steps import Step

_MADE_BY = {
    "dataset": ("prepare",),
    "store": ("capture", "convert", "import"),
    "bigram_store": ("capture", "convert", "import"),
    "checkpoint": ("train",),
    "init_from": ("train",),
}
"""Commands whose outputs a flag reads."""
_SHAPE = (
    "draft", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window",
    "rope_theta",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class CheckedStep:
    """A step with its parsed arguments, in which what is not known yet has stand-ins."""

    step: Step
    known: Known
    arguments: Namespace


Checked = Mapping[str, CheckedStep]


def check_steps(steps: Sequence[Step]) -> dict[str, CheckedStep]:
    """Parse every step, build its settings, and compare it with the steps that it reads. Return them by name.

    Raises InputError for the first step that can't work, with its place in the recipe.
    """
    above: dict[str, Step] = {}
    checked: dict[str, CheckedStep] = {}
    for step in steps:
        _check_references(step, above)
        known = decide(step, above)
        item = CheckedStep(step=step, known=known, arguments=step.parse(known.values))
        module = importlib.import_module(COMMANDS[step.command][0])
        try:
            if check := getattr(module, "check", None):
                check(item.arguments)
        except DraftcacheError as exc:
            raise InputError(f"{step.place(_flag_in(str(exc)))}: {exc}") from exc
        _check_outside(item, above)
        if compare := _COMPARED.get(step.command):
            compare(item, checked)
        above[step.name] = step
        checked[step.name] = item
    return checked


def _flag_in(message: str) -> str:
    """Return the key that a message of the form `--flag: ...` is about, or "" for none."""
    flag = message.partition(":")[0].partition(" ")[0]
    return flag.removeprefix("--").replace("-", "_") if flag.startswith("--") else ""


def _check_references(step: Step, above: Mapping[str, Step]) -> None:
    """Raise InputError where a flag reads the output of a step of another kind."""
    for flag, makers in _MADE_BY.items():
        value = step.values.get(flag)
        for name in step.uses:
            if value == above[name].output and above[name].command not in makers:
                raise InputError(
                    f"{step.place(flag)}: {flag}: expected a {' or '.join(makers)} step, found @{name}, "
                    f"which is a {above[name].command} step"
                )


def _check_outside(item: CheckedStep, above: Mapping[str, Step]) -> None:
    """Raise InputError where a path that no step makes is not there."""
    step = item.step
    made = [above[name].output for name in step.uses]
    for flag in ("tokenizer", "verifier", "dataset", "store", "checkpoint", "init_from", "vocab_map", "bigram_store"):
        value = step.values.get(flag)
        if not isinstance(value, str) or "://" in value or any(value.startswith(path) for path in made):
            continue
        if not Path(value).exists() and not (Path(value).name == "best" and Path(value).parent.is_dir()):
            raise InputError(f"{step.place(flag)}: {flag}: expected something at {value}, found nothing there")
    if step.command not in ("prepare", "generate"):
        return
    from draftcache.capture.prepare.rows.hub import hub_name
    from draftcache.capture.prepare.rows.sources import expand_input

    for flag in ("inputs", "held_out"):
        for pair in getattr(item.arguments, flag, ()):
            text = pair.partition("=")[2]
            hub = hub_name(text) is not None and not Path(text).parent.is_dir()
            if any(text.startswith(path) for path in made) or Path(text).exists() or hub:
                continue
            try:
                expand_input(text)
            except InputError as exc:
                raise InputError(f"{step.place(flag)}: {flag}: {exc}") from exc


def _check_capture(item: CheckedStep, checked: Checked) -> None:
    step, arguments = item.step, item.arguments
    config = _verifier(arguments.verifier)
    blocks = config.get("num_hidden_layers") or len(config.get("layers_block_type") or ())
    if blocks and arguments.layers and arguments.layers[-1] >= blocks:
        raise InputError(
            f"{step.place('layers')}: layers: expected blocks 0 to {blocks - 1} of {arguments.verifier}, found "
            f"{list(arguments.layers)}"
        )
    _require_splits(step, "splits", arguments.splits, _dataset_splits(str(arguments.dataset), checked))
    size = _vocab_size(item, checked)
    if size is not None and config.get("vocab_size") and size > config["vocab_size"]:
        raise InputError(
            f"{step.place('vocab_map')}: expected a draft vocabulary of at most the verifier's "
            f"{config['vocab_size']} ids, found one of {size}"
        )
    if size is not None and arguments.teacher == "draft" and arguments.top_k > size:
        raise InputError(
            f"{step.place('top_k')}: top_k: expected at most the draft vocabulary's {size}, found {arguments.top_k}"
        )


def _check_train(item: CheckedStep, checked: Checked) -> None:
    step, arguments = item.step, item.arguments
    splits = _store_splits(arguments.store, checked)
    _require_splits(step, "splits", arguments.splits, splits)
    _require_splits(step, "eval_split", [arguments.eval_split] if arguments.eval_split else [], splits)
    kept, window = _store_window(arguments.store, checked), arguments.sliding_window
    if kept and (not window or window > kept):
        raise InputError(
            f"{step.place('sliding_window')}: sliding_window: expected at most {kept}, the window of the store, found "
            f"{window or 'full attention'}"
        )
    if arguments.batch_conversations < step.processes:
        raise InputError(
            f"{step.place('batch_conversations')}: batch_conversations: expected at least one for each of the "
            f"{step.processes} processes, found {arguments.batch_conversations}"
        )
    before = _made(str(arguments.init_from), checked) if arguments.init_from is not None else None
    if before is None:
        return
    for name in _SHAPE:
        mine, theirs = getattr(arguments, name), getattr(before.arguments, name)
        if mine != theirs:
            raise InputError(
                f"{step.place(name)}: {name}: expected {theirs!r}, as in [{before.step.name}], whose weights it starts "
                f"from, found {mine!r}"
            )
    maps = [_map_of(one, checked) for one in (arguments.store, before.arguments.store)]
    if None not in maps and maps[0] != maps[1]:
        raise InputError(
            f"{step.place('init_from')}: init_from: expected stores under one draft vocabulary in both stages, found "
            f"{maps[0]} here and {maps[1]} in [{before.step.name}]: give both captures the map of one [vocab] step"
        )


def _check_eval(item: CheckedStep, checked: Checked) -> None:
    step, arguments = item.step, item.arguments
    _require_splits(step, "splits", split_names(arguments.splits), _store_splits(arguments.store, checked))
    if arguments.bigram_splits:
        store = arguments.bigram_store or arguments.store
        _require_splits(step, "bigram_splits", split_names(arguments.bigram_splits), _store_splits(store, checked))
    if arguments.draft_tokens < 1:
        raise InputError(
            f"{step.place('draft_tokens')}: draft_tokens: expected at least 1, found {arguments.draft_tokens}"
        )


def _check_vocab(item: CheckedStep, checked: Checked) -> None:
    step, arguments = item.step, item.arguments
    if arguments.size < 1:
        raise InputError(f"{step.place('size')}: size: expected at least 1, found {arguments.size}")
    for text in arguments.inputs:
        path, _, split = text.rpartition(":")
        if path and (made := _made(path, checked)) is not None:
            _require_splits(step, "inputs", [split], _prepared_splits(made.arguments))


_COMPARED: dict[str, Callable[[CheckedStep, Checked], None]] = {
    "vocab": _check_vocab,
    "capture": _check_capture,
    "train": _check_train,
    "eval": _check_eval,
}


def _require_splits(step: Step, flag: str, wanted: Sequence[str], found: Sequence[str] | None) -> None:
    if found is None:
        return
    for name in wanted:
        if name not in found:
            raise InputError(
                f"{step.place(flag)}: {flag}: expected one of the splits {list(found)}, found {name!r}: "
                f"{nearest(name, found)}"
            )


def _made(path: str, checked: Checked) -> CheckedStep | None:
    """Return the step whose output a path is, or None."""
    return next((one for one in checked.values() if one.step.output == path), None)


def _prepared_splits(arguments: Namespace) -> list[str]:
    return [pair.partition("=")[0] for pair in (*arguments.inputs, *arguments.held_out)]


def _dataset_splits(path: str, checked: Checked) -> Sequence[str] | None:
    if (made := _made(path, checked)) is not None:
        return _prepared_splits(made.arguments) if made.step.command == "prepare" else None
    from draftcache.capture.prepare.token_dataset import TokenDataset

    return list(TokenDataset.open(Path(path)).splits)


def _store_splits(location: Any, checked: Checked) -> Sequence[str] | None:
    if (made := _made(str(location), checked)) is not None:
        if made.step.command != "capture":
            return None
        return made.arguments.splits or _dataset_splits(str(made.arguments.dataset), checked)
    from draftcache.store.reader import StoreReader

    return list(StoreReader(location).manifest.splits)


def _store_window(location: Any, checked: Checked) -> int | None:
    """Return the window that a store keeps, or None where it keeps every row, or is not known."""
    if (made := _made(str(location), checked)) is not None:
        return made.arguments.window or None if made.step.command == "capture" else None
    from draftcache.store.reader import StoreReader

    return StoreReader(location).manifest.window


def _map_of(location: Any, checked: Checked) -> str | None:
    """Return the path of the vocabulary map that a store is captured with, or None where no step of the recipe does."""
    made = _made(str(location), checked)
    if made is None or made.step.command != "capture":
        return None
    given = made.arguments.vocab_map
    return f"{made.arguments.dataset}/vocab_map.safetensors" if given is None else str(given)


def _vocab_size(item: CheckedStep, checked: Checked) -> int | None:
    """Return the size of the draft vocabulary of a capture step, or None where no step of the recipe decides it."""
    given = item.arguments.vocab_map
    if given is not None:
        made = _made(str(given), checked)
        return None if made is None else int(made.arguments.size)
    made = _made(str(item.arguments.dataset), checked)
    if made is None:
        return None
    if made.arguments.draft_vocab_size is None:
        raise InputError(
            f"{item.step.place('vocab_map')}: expected a vocab_map, or a draft_vocab_size in [{made.step.name}], "
            "found neither"
        )
    return int(made.arguments.draft_vocab_size)


def _verifier(path: Path) -> dict[str, Any]:
    """Return the verifier's config (its text model's), empty where it can't be read: the command says what is wrong."""
    try:
        found = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    config = found.get("text_config", found) if isinstance(found, dict) else {}
    return config if isinstance(config, dict) else {}
