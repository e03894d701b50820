"""`draftcache run --dry-run`: the commands of a recipe, and what they will take, before anything runs."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from draftcache.draft_train.config import TrainConfig
from draftcache.store.common.errors import DraftcacheError
from draftcache.tools.arguments import read_settings
from draftcache.tools.cli import COMMANDS
from draftcache.tools.recipes.auto import capture_of, decide, split_names, verifier_config
from draftcache.tools.recipes.checks import Checked, CheckedStep
from draftcache.tools.recipes.recipe import Recipe
from draftcache.tools.recipes.records import Records
from draftcache.tools.recipes.runner import typed
from draftcache.tools.recipes.steps import Step, parser_of
from draftcache.tools.reports.sizing import GPU_TFLOPS

BYTES_PER_TOKEN = 4.0
"""Bytes of JSONL per token, for a guess before data is prepared: 4.2 and 3.3 in the published recipe's two sets."""
COMPRESSED = {".gz": 4.0, ".zst": 4.0, ".xz": 5.0, ".bz2": 5.0, ".parquet": 3.0}
"""About how many times larger the rows are than such files."""
TRAIN_SHARE = 0.7
"""Share of an H100's matrix products that training reaches (tools/bench/results/train-h100.json)."""


def plan_of(recipe: Recipe, checked: Checked, folder: Path) -> dict[str, Any]:
    """Return what a run would do, as JSON values: per step its command line, whether it is done, and its estimate."""
    records, above, rows = Records(folder), dict[str, Step](), list[dict[str, Any]]()
    for item in checked.values():
        step, known = item.step, decide(item.step, above)
        words = step.words(known.values)
        done = records.exit_code(step, words, above) is not None
        shown = (
            step.words({**known.values, **known.guessed}) if not known.guessed else _with_guesses(words, known.guessed)
        )
        row: dict[str, Any] = {"name": step.name, "line": typed(step.as_typed(shown)), "done": done, "estimate": None}
        estimate = {"capture": _capture, "train": _train}.get(step.command)
        if estimate is not None and not done:
            try:
                row["estimate"] = estimate(item, checked, above)
            except (DraftcacheError, OSError) as exc:
                row["estimate"] = {"unknown": " ".join(str(exc).split())}
        above[step.name] = step
        rows.append(row)
    found = [row["estimate"] for row in rows if row["estimate"]]
    return {
        "recipe": str(recipe.path),
        "output": str(folder),
        "variables": recipe.variables,
        "left_out": list(recipe.left_out),
        "steps": rows,
        "total": {
            "bytes": sum(one.get("bytes", 0) for one in found),
            "hours": sum(one.get("hours") or 0.0 for one in found),
            "gpu_bytes": max((one.get("gpu_bytes", 0) for one in found), default=0),
        },
    }


def _with_guesses(words: Sequence[str], guessed: Mapping[str, str]) -> list[str]:
    flags = {"--" + name.replace("_", "-"): "auto" for name in guessed}
    return [flags.get(before, word) for before, word in zip(["", *words], words, strict=False)]


def _capture(item: CheckedStep, checked: Checked, above: Mapping[str, Step]) -> dict[str, Any]:
    """Return bytes and hours of a store, by the functions behind `draftcache size`."""
    from draftcache.capture.prepare.token_dataset import is_prepared

    arguments = item.arguments
    dataset, config = Path(arguments.dataset), verifier_config(item.step, above) or {}
    words = ["--verifier", str(arguments.verifier), "--mode", arguments.mode, "--layout", arguments.layout]
    words += ["--layers", ",".join(map(str, _layers(arguments.layers, config))), "--teacher", arguments.teacher]
    words += ["--top-k", str(arguments.top_k), "--window", str(arguments.window)]
    words += ["--shard-tokens", str(arguments.shard_tokens)]
    if size := _draft_ids(item, checked):
        words += ["--draft-vocab-size", str(size)]
    if is_prepared(dataset):
        words += ["--dataset", str(dataset)]
    else:
        tokens = guessed_tokens(_maker(str(dataset), checked), arguments.splits, above)
        words += ["--tokens", str(tokens), "--loss-fraction", "1", "--mean-length", str(min(8192, tokens))]
    module = importlib.import_module(COMMANDS["size"][0])
    found = module.size(parser_of("size").parse_args(words))
    (mode,) = found["modes"].values()
    return {
        "tokens": found["counts"]["tokens"],
        "basis": "of the prepared data" if is_prepared(dataset) else GUESS,
        "bytes": mode["bytes"],
        "hours": None if mode["wall_seconds"] is None else mode["wall_seconds"] / 3600,
    }


GUESS = "a guess by the files' sizes, without truncation, every token with loss: known once the data is prepared"


def guessed_tokens(prepare: CheckedStep | None, splits: Sequence[str], above: Mapping[str, Step]) -> int:
    """Return a guess of the tokens of a prepare step's inputs, by the sizes of their files.

    Raises DraftcacheError where the inputs are not there yet.
    """
    from draftcache.capture.prepare.rows.hub import hub_name
    from draftcache.capture.prepare.rows.sources import expand_input
    from draftcache.store.common.errors import InputError

    if prepare is None:
        raise InputError("known once the data is prepared")
    total = 0.0
    for pair in (*prepare.arguments.inputs, *prepare.arguments.held_out):
        name, _, text = pair.partition("=")
        if splits and name not in splits:
            continue
        made = next((one.name for one in above.values() if text.startswith(one.output)), None)
        if not Path(text).exists() and (made or hub_name(text) is not None):
            raise InputError(f"known once {f'[{made}] has run' if made else f'{text} is downloaded'}")
        for path in expand_input(text):
            total += path.stat().st_size * COMPRESSED.get(path.suffix, 1.0)
    return max(1, round(total / BYTES_PER_TOKEN))


def _train(item: CheckedStep, checked: Checked, above: Mapping[str, Step]) -> dict[str, Any]:
    """Return GPU memory and hours of a training run, by the functions behind `draftcache size --train`."""
    from draftcache.draft_train.setting_tables import MEMORY_SETTINGS
    from draftcache.tools.reports.training_memory import training_memory

    arguments = item.arguments
    capture = capture_of(item.step, above)
    maker = None if capture is None else checked[capture.name]
    words = ["--train", "--window", str(arguments.sliding_window)]
    for name in MEMORY_SETTINGS:
        words += _flag(name, getattr(arguments, name))
    config = verifier_config(item.step, above) or {}
    if maker is None or _finished(str(arguments.store)):
        words += ["--store", str(arguments.store)]
    else:
        prepare = _maker(str(maker.arguments.dataset), checked)
        length = 32_768 if prepare is None else prepare.arguments.max_length
        words += ["--length", str(length), "--verifier", str(maker.arguments.verifier), "--top-k"]
        words += [str(maker.arguments.top_k), "--teacher", maker.arguments.teacher]
        words += ["--layers", ",".join(map(str, _layers(maker.arguments.layers, config)))]
        words += ["--draft-vocab-size", str(_draft_ids(maker, checked) or 32_000)]
    found = training_memory(parser_of("size").parse_args(words), config)
    flash, recompute = arguments.attention == "flash", arguments.recompute_mlp
    setting = found["settings"]["--recompute-mlp" if recompute else "--attention flash" if flash else "default"]
    tokens, loss, basis = _train_tokens(item, maker, checked, above)
    seconds = _train_seconds(found["draft"], arguments, tokens, loss)
    return {
        "gpu_bytes": setting["total"],
        "longest": setting["tokens"],
        "tokens": None if tokens is None else tokens * arguments.epochs,
        "basis": basis,
        "hours": None if seconds is None else seconds / 3600 / item.step.processes,
    }


def _train_tokens(
    item: CheckedStep, maker: CheckedStep | None, checked: Checked, above: Mapping[str, Step]
) -> tuple[int | None, int | None, str]:
    """Return tokens and loss tokens of an epoch, None where they are not known, and where they come from."""
    from draftcache.capture.prepare.token_dataset import TokenDataset, is_prepared

    splits = split_names(item.arguments.splits)
    if maker is None:
        return None, None, "the store's"
    dataset = Path(maker.arguments.dataset)
    if is_prepared(dataset):
        parts = [TokenDataset.open(dataset).split(name).conversations for name in splits]
        tokens, loss = (sum(int(part[name].sum()) for part in parts) for name in ("tokens", "loss_tokens"))
        return tokens, loss, "of the prepared data"
    try:
        tokens = guessed_tokens(_maker(str(dataset), checked), splits, above)
    except DraftcacheError as exc:
        return None, None, " ".join(str(exc).split())
    return tokens, tokens, GUESS


def _train_seconds(draft: dict[str, Any], arguments: Any, tokens: int | None, loss: int | None) -> float | None:
    """Return the seconds of a run on one H100, from the operations that its steps need. `draft` is the shape's JSON.

    Every loss token starts a row that goes on to the end, and a full attention is that over 32,768 tokens.
    """
    from draftcache.draft_train.drafts.registry import find_architecture
    from draftcache.draft_train.drafts.sizes import BatchRows

    if tokens is None or loss is None:
        return None
    config = read_settings(TrainConfig, arguments)
    architecture = find_architecture(config.draft)
    length = min(tokens, 32_768)
    rows = BatchRows(rows=length, starts=max(1, length * loss // max(1, tokens)), top_k=0)
    operations = architecture.operations(architecture.read_shape(draft), config, rows) * tokens / max(1, length)
    return config.epochs * operations / (TRAIN_SHARE * GPU_TFLOPS["h100"] * 1e12)


def _flag(name: str, value: Any) -> list[str]:
    """Return the words of a command that give the setting `name` this value."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]


def _layers(given: Sequence[int], config: Mapping[str, Any]) -> Sequence[int]:
    from draftcache.capture.job.config import layers_by_depth

    blocks = config.get("num_hidden_layers") or len(config.get("layers_block_type") or ())
    return given or (layers_by_depth(blocks, str(config.get("model_type", ""))) if blocks else (2, 26, 48))


def _maker(path: str, checked: Checked) -> CheckedStep | None:
    return next((one for one in checked.values() if one.step.output == path), None)


def _draft_ids(capture: CheckedStep, checked: Checked) -> int | None:
    given = capture.arguments.vocab_map
    made = _maker(str(given if given is not None else capture.arguments.dataset), checked)
    if made is None:
        return None
    return int(made.arguments.size if made.step.command == "vocab" else made.arguments.draft_vocab_size or 0) or None


def _finished(store: str) -> bool:
    from draftcache.store.reader import StoreReader

    try:
        StoreReader(store)
    except (DraftcacheError, OSError):
        return False
    return True


def format_plan(plan: Mapping[str, Any]) -> str:
    """Format what `plan_of` returns."""
    chosen = ", ".join(f"{name} = {value}" for name, value in plan["variables"].items())
    lines = [f"{plan['recipe']} -> {plan['output']}", f"variables: {chosen or 'none'}"]
    lines += [f"left out: {name}" for name in plan["left_out"]]
    for row in plan["steps"]:
        lines += ["", f"[{row['name']}] {'is done' if row['done'] else 'will run'}", f"$ {row['line']}"]
        if row["estimate"] is not None:
            lines.append(f"  {_estimate_text(row['estimate'])}")
    total = plan["total"]
    lines += [
        "",
        f"what can be known now, in all: {total['bytes'] / 1e9:,.2f} GB of stores, {total['hours']:,.2f} h (estimated "
        f"for an H100 and a disk of a GB per second), {total['gpu_bytes'] / 2**30:,.2f} GiB of GPU memory to train",
    ]
    return "\n".join(lines)


def _estimate_text(found: Mapping[str, Any]) -> str:
    if "unknown" in found:
        return f"sizes: {found['unknown']}"
    parts = []
    if "bytes" in found:
        parts.append(f"{found['bytes'] / 1e9:,.2f} GB")
    if "gpu_bytes" in found:
        parts.append(f"{found['gpu_bytes'] / 2**30:,.2f} GiB of GPU memory at {found['longest']:,} tokens")
    if found["hours"] is not None:
        parts.append(f"{found['hours']:,.2f} h")
    tokens = "" if found["tokens"] is None else f"{found['tokens']:,} tokens, "
    return f"{', '.join(parts)} ({tokens}{found['basis']})"
