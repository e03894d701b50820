"""Losses, gradient norms and acceptance of short runs on the CPU in float32, against a recorded trace.

The trace was recorded before the draft became an object behind a protocol. A change of the house leaves it as it is; a
change of the loss or of the order of conversations has to record it again, and say so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from draftcache.draft_train.trainer import Trainer
from support.synthetic import write_store
from support.training_runs import config, metrics

RECORDED = json.loads((Path(__file__).parent / "recorded" / "loss_traces.json").read_text())
RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    "drop-lk": {"loss": "lk", "out_of_vocab": "drop"},
    "unshifted": {"loss_rows": "unshifted"},
    "tv-bucketed": {"loss": "tv", "order": "bucketed", "batch_conversations": 4, "pack_tokens": 100},
    "renormalized": {"loss": "renormalized-kl"},
    "lk-alpha": {"loss": "lk-alpha", "out_of_vocab": "keep"},
}
TOLERANCE = 2e-5
"""Relative: processors sum in different orders. A step's loss moves by far more when a row is added or left out."""


def trace(tmp_path: Path, **changes: Any) -> list[dict[str, Any]]:
    write_store(tmp_path / "store", per_shard=6)
    settings = config(tmp_path, **changes, eval_split="val", eval_every=4)
    Trainer(settings).run()
    return metrics(settings.output)


@pytest.mark.parametrize("name", RUNS)
def test_the_trace_is_the_recorded_one(tmp_path: Path, name: str) -> None:
    found = trace(tmp_path, **RUNS[name])
    assert len(found) == len(RECORDED[name])
    for mine, recorded in zip(found, RECORDED[name], strict=True):
        for key, value in recorded.items():
            assert mine[key] == pytest.approx(value, rel=TOLERANCE), key


def test_other_settings_leave_the_trace(tmp_path: Path) -> None:
    """The tolerance tells a small change of the settings from rounding."""
    found = trace(tmp_path, step_decay=0.801)
    assert found[0]["loss"] != pytest.approx(RECORDED["default"][0]["loss"], rel=TOLERANCE)
