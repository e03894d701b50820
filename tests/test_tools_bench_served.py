"""`draftcache.tools.bench.served`: the drafts that it has vLLM load, and its figures. A real vLLM runs it by hand."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from draftcache.draft_train.served_report import check_export
from draftcache.tools.bench.parts.served_engine import DraftClock, times_in_trace
from draftcache.tools.bench.served import SHAPES, _cases, metrics, save_draft, save_verifier_config


@pytest.mark.parametrize("window", [128, 0])
def test_drafts_are_whole_exports_of_their_window(tmp_path: Path, window: int) -> None:
    verifier, config = save_verifier_config("small", tmp_path)
    draft = save_draft(SHAPES["small"], config, tmp_path, window, 4096)
    report = check_export(draft, verifier=verifier)
    assert not report.errors, report.text()
    written = json.loads((draft / "config.json").read_text())
    assert written["layer_types"] == ["sliding_attention" if window else "full_attention"]
    assert written["sliding_window"] == (window or None)
    assert written["eagle_aux_hidden_state_layer_ids"] == [2, 3, 5]
    beyond = replace(SHAPES["small"], layers=(1, 2, 9))  # negative control: the verifier has six blocks
    assert check_export(save_draft(beyond, config, tmp_path / "beyond", window, 4096), verifier=verifier).errors


def test_cases_are_windows_or_none() -> None:
    assert _cases("plain,window-full,window-512") == {"plain": None, "window-full": 0, "window-512": 512}
    for text in ("window", "window-0", "window--1", "512", "plain,"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected window-W, window-full or plain, found"):
            _cases(text)


def test_figures_of_a_start() -> None:
    kernels = {"step_kernel_ms": 2.0, "draft_kernel_ms": 0.5}
    run = {"step_ms": 3.0, "draft_ms": 1.5, "prefill_s": 0.2, "steps": 7, "kernels": kernels}
    group = {"spec": "SlidingWindowSpec", "layers": 1, "block_tokens": 16, "page_bytes": 8192, "window": 4096}
    other = {"spec": "MambaSpec", "layers": 9, "block_tokens": 16, "page_bytes": 1, "window": None, "of_draft": False}
    found = {
        "kv_tokens": 1000, "memory_gib": 70.5, "groups": [group | {"of_draft": True}, other],
        "runs": {"1024": run, "32768": run | {"draft_ms": None, "kernels": None}},
    }  # fmt: skip
    made = {name: (value, unit) for name, value, unit in metrics(found, {"engine": "vllm 0.26.0"})}
    assert made["kv_tokens"] == (1000, "tokens, vllm 0.26.0")
    assert made["draft_kv_bytes"] == (512, "bytes/token, SlidingWindowSpec")
    assert made["kv_groups"] == (2, "groups of layers")
    assert made["draft_window"] == (4096, "tokens, SlidingWindowSpec")
    assert made["draft_ms@1024"] == (1.5, "ms")
    assert made["draft_kernel_ms@1024"] == (0.5, "ms")
    assert not {"draft_ms@32768", "draft_kernel_ms@32768"} & set(made)


def test_the_draft_is_timed_in_steps_alone() -> None:
    clock = DraftClock()
    clock.on_gpu = False
    clock.calls = [(0.0, 9.0), (10.0, 19.0), (20.0, 20.001), (30.0, 30.003), (40.0, 40.002)]  # a prompt in two pieces
    assert clock.median_ms(3) == pytest.approx(2)
    assert clock.median_ms(5) == pytest.approx(3)  # negative control
    assert clock.median_ms(0) is None


def test_kernels_in_a_trace_are_those_of_steps_behind_the_prompt() -> None:
    def event(at: float, dur: float, kind: str = "kernel", name: str = "gemm") -> dict[str, Any]:
        return {"ph": "X", "cat": kind, "name": name, "ts": at, "dur": dur}

    proposals = [event(at, 20, "gpu_user_annotation", "draft proposal") for at in (100, 200, 300)]
    others = [event(100, 20, "gpu_user_annotation", "forward"), event(150, 5, "cpu_op"), {"ph": "M", "name": "process"}]
    prompt = [event(10, 70), event(101, 10)]  # the prompt's, and the proposal that follows it
    steps = [event(130, 40), event(201, 9), event(212, 3, "gpu_memcpy"), event(240, 30), event(305, 8)]
    expected = pytest.approx({"step_kernel_ms": 0.045, "draft_kernel_ms": 0.010})
    assert times_in_trace([*prompt, *steps, *proposals, *others], 2) == expected
    earlier = [
        event(-90, 20, "gpu_user_annotation", "draft proposal"),
        event(-85, 12),
        event(-50, 90),
    ]  # a prompt in two pieces
    assert times_in_trace([*earlier, *prompt, *steps, *proposals, *others], 2) == expected
    assert times_in_trace([*earlier, *prompt, *steps, *proposals, *others], 3) != expected
    assert times_in_trace([*prompt, *steps, proposals[0]], 1) is None
    assert times_in_trace([*prompt, *steps, *proposals], 0) is None
