"""Small training runs over a synthetic store: their settings, their command line, what they log."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from draftcache.draft_train.config import TrainConfig
from draftcache.draft_train.state_file import STATE_NAME
from draftcache.store.common.files import hash_file
from draftcache.store.common.sealed_json import seal, unseal


def config(tmp_path: Path, **changes: object) -> TrainConfig:
    """Return settings of a short run on the CPU that reads `tmp_path/store` and writes `tmp_path/run`."""
    values: dict[str, object] = {
        "store": tmp_path / "store", "output": tmp_path / "run", "splits": ("train",), "epochs": 4,
        "batch_conversations": 2, "learning_rate": 1e-2, "ttt_steps": 3, "sliding_window": 16, "head_dim": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "checkpoint_every": 3, "device": "cpu",
    }  # fmt: skip
    return TrainConfig(**values | changes)  # type: ignore[arg-type]


def flags(settings: TrainConfig) -> list[str]:
    """Return the command line's flags of what `config` sets, and of nothing else that was changed."""
    names = ["store", "output", "epochs", "batch_conversations", "learning_rate", "ttt_steps", "sliding_window"]
    names += ["head_dim", "num_attention_heads", "num_key_value_heads", "checkpoint_every", "device"]
    pairs = [(f"--{name.replace('_', '-')}", str(getattr(settings, name))) for name in names]
    return ["--splits", ",".join(settings.splits), *[part for pair in pairs for part in pair]]


def rewrite_state(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the values of a checkpoint's state.json, with the hashes that it should then have."""
    file = checkpoint / STATE_NAME
    body = unseal(file.read_bytes(), str(file))
    body["files"] = {name: hash_file(checkpoint / name) for name in body["files"]}
    change(body)
    file.write_bytes(seal(body))


def metrics(output: Path) -> list[dict[str, float]]:
    """Read the rows of a run's metrics file, one for each step."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
