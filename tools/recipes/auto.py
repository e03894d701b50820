"""The values that `"auto"` stands for in a recipe: they follow from the verifier's config and the data's size.

| flag | rule |
|---|---|
| `prepare` max_length | the verifier's max_position_embeddings, at most 32,768 |
| `prepare`, `vocab` draft vocabulary | 32,000 ids, or three quarters of the verifier's where that is less |
| `train` num_attention_heads, num_key_value_heads, head_dim | the verifier's own attention |
| `train` rope_theta | the verifier's own base, 10,000 where it has none |
| `train` sliding_window | that of the store, at most 4,096 |
| `train` learning_rate | by the number of optimizer steps: `learning_rate_for` |
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftcache.store.common.errors import DraftcacheError, InputError
from draftcache.tools.recipes.steps import AUTO, Step

FEW_STEPS, MANY_STEPS = 100, 10_000
FEW_STEPS_RATE, MANY_STEPS_RATE = 2e-3, 1e-4
WARM_START_SHARE = 0.5
MOST_TOKENS, MOST_DRAFT_IDS, MOST_WINDOW = 32_768, 32_000, 4_096


def learning_rate_for(steps: int, *, warm_start: bool = False) -> float:
    """Return a peak learning rate for a run of so many optimizer steps.

    It falls log-linearly from 2e-3 at 100 steps or fewer to 1e-4 at 10,000 or more. Both ends are measured: on 104
    steps 1e-4 gave acceptance 1.04 where 2e-3 gave 1.18, and 1e-4 is the published recipe's rate for its first stage
    of 10,000 steps. A warm start takes half of it, as the published second stage does (5e-5).
    """
    place = math.log(max(steps, 1) / FEW_STEPS) / math.log(MANY_STEPS / FEW_STEPS)
    share = min(1.0, max(0.0, place))
    rate = FEW_STEPS_RATE * (MANY_STEPS_RATE / FEW_STEPS_RATE) ** share
    return float(f"{rate * (WARM_START_SHARE if warm_start else 1.0):.2g}")


@dataclass(frozen=True, kw_only=True)
class Known:
    """The values of a step's `auto` flags."""

    values: dict[str, Any]
    guessed: dict[str, str]
    """What is not known yet, and so has a stand-in among `values`: when it will be, by flag."""


def decide(step: Step, above: Mapping[str, Step]) -> Known:
    """Return the values of the flags of a step that are "auto". `above` holds the steps above it, by name.

    Raises InputError where "auto" has no rule for a flag, or the verifier's config does not say what the rule needs.
    """
    wanted = [name for name, value in step.values.items() if value == AUTO and name not in _COMMANDS_OWN]
    values: dict[str, Any] = {}
    guessed: dict[str, str] = {}
    for name in wanted:
        if (step.command, name) == ("train", "learning_rate"):
            count = optimizer_steps(step, above)
            if count is None:
                guessed[name] = "auto: 1e-4 to 2e-3 by the steps, once the data is prepared"
            values[name] = learning_rate_for(count or MANY_STEPS, warm_start="init_from" in step.values)
            continue
        rule = _RULES.get((step.command, name))
        if rule is None:
            known = sorted({flag for command, flag in _RULES if command == step.command} | {"learning_rate"})
            raise InputError(f'{step.place(name)}: {name}: expected a value, found "auto", which is there for {known}')
        values[name] = rule(step, above)
    return Known(values=values, guessed=guessed)


_COMMANDS_OWN = ("layers", "device", "compute", "compute_dtype", "turns")
"""Flags to which "auto" means something already."""


def capture_of(step: Step, above: Mapping[str, Step]) -> Step | None:
    """Return the capture step whose store a step reads, or None."""
    found = [above[name] for name in step.uses if above[name].command == "capture"]
    return next((one for one in found if one.output == step.values.get("store")), None)


def verifier_config(step: Step, above: Mapping[str, Step]) -> dict[str, Any] | None:
    """Return the config of the verifier that a step works for (its text model's), or None where no directory has it."""
    source = step if step.command != "train" else capture_of(step, above)
    if source is not None and source.command == "vocab":
        source = next((above[name] for name in source.uses if above[name].command == "prepare"), None)
    directory = None if source is None else source.values.get("verifier") or source.values.get("tokenizer")
    if directory is None or not (Path(directory) / "config.json").is_file():
        return None
    try:
        found = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    except ValueError as exc:
        raise InputError(f"{directory}/config.json: expected JSON, found something else ({exc})") from exc
    return dict(found.get("text_config", found)) if isinstance(found, dict) else None


def optimizer_steps(step: Step, above: Mapping[str, Step]) -> int | None:
    """Return the optimizer steps of a train step, or None where its data is not prepared yet."""
    count = conversations_of(step, above)
    if count is None:
        return None
    batch, epochs = step.values.get("batch_conversations", 1), step.values.get("epochs", 1)
    return int(epochs) * math.ceil(count / int(batch))


def conversations_of(step: Step, above: Mapping[str, Step]) -> int | None:
    """Return how many conversations a train step has an epoch of, or None where they are not prepared yet."""
    from draftcache.capture.prepare.token_dataset import TokenDataset, is_prepared
    from draftcache.store.reader import StoreReader

    splits = split_names(step.values.get("splits", ()))
    capture = capture_of(step, above)
    try:
        if capture is None:
            store = StoreReader(step.values["store"])
            return sum(int(store.members(split).size) for split in splits)
        dataset = Path(capture.values["dataset"])
        if not is_prepared(dataset):
            return None
        prepared = TokenDataset.open(dataset)
        return sum(len(prepared.split(split)) for split in splits)
    except DraftcacheError:
        return None  # the step itself says what is wrong, when it runs


def split_names(value: Any) -> list[str]:
    """Return split names of a list, or of a text with commas."""
    parts: Sequence[Any] = value if isinstance(value, list | tuple) else str(value).split(",")
    return [str(part) for part in parts if part != ""]


def _config(step: Step, above: Mapping[str, Step], flag: str) -> dict[str, Any]:
    found = verifier_config(step, above)
    if found is None:
        raise InputError(
            f'{step.place(flag)}: {flag}: expected the verifier\'s directory with a config.json, for "auto", found none'
        )
    return found


def _number(config: Mapping[str, Any], step: Step, flag: str, *names: str) -> int:
    for name in names:
        if isinstance(found := config.get(name), int) and found > 0:
            return found
    raise InputError(f'{step.place(flag)}: {flag}: the verifier\'s config has no {names[0]}: give a number for "auto"')


def _max_length(step: Step, above: Mapping[str, Step]) -> int:
    positions = _config(step, above, "max_length").get("max_position_embeddings")
    return min(MOST_TOKENS, positions) if isinstance(positions, int) and positions > 0 else MOST_TOKENS


def _draft_ids(step: Step, above: Mapping[str, Step]) -> int:
    vocab = _number(_config(step, above, "draft_vocab_size"), step, "draft_vocab_size", "vocab_size")
    return min(MOST_DRAFT_IDS, vocab * 3 // 4)


def _heads(step: Step, above: Mapping[str, Step]) -> int:
    return _number(_config(step, above, "num_attention_heads"), step, "num_attention_heads", "num_attention_heads")


def _kv_heads(step: Step, above: Mapping[str, Step]) -> int:
    config = _config(step, above, "num_key_value_heads")
    return _number(config, step, "num_key_value_heads", "num_key_value_heads", "num_attention_heads")


def _head_dim(step: Step, above: Mapping[str, Step]) -> int:
    config = _config(step, above, "head_dim")
    if isinstance(own := config.get("head_dim"), int) and own > 0:
        return own
    return _number(config, step, "head_dim", "hidden_size") // _heads(step, above)


def _rope_theta(step: Step, above: Mapping[str, Step]) -> float:
    config = _config(step, above, "rope_theta")
    scaled = config.get("rope_parameters") or {}
    found = config.get("rope_theta") or (scaled.get("rope_theta") if isinstance(scaled, dict) else None)
    return float(found) if isinstance(found, int | float) and found > 0 else 10_000.0


def _window(step: Step, above: Mapping[str, Step]) -> int:
    capture = capture_of(step, above)
    window = MOST_WINDOW if capture is None else int(capture.values.get("window", MOST_WINDOW))
    return min(MOST_WINDOW, window) if window else MOST_WINDOW


_RULES: dict[tuple[str, str], Any] = {
    ("prepare", "max_length"): _max_length,
    ("prepare", "draft_vocab_size"): _draft_ids,
    ("vocab", "size"): _draft_ids,
    ("train", "num_attention_heads"): _heads,
    ("train", "num_key_value_heads"): _kv_heads,
    ("train", "head_dim"): _head_dim,
    ("train", "rope_theta"): _rope_theta,
    ("train", "sliding_window"): _window,
}
