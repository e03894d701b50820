"""Times a draft inside vLLM: `PYTHON served_engine.py REQUEST RESULT`, both JSON, under an interpreter that has vLLM.

It imports nothing of draftcache. REQUEST: `model`, `options` (of `vllm.LLM`), `contexts` (lengths of prompts),
`tokens` (of each answer) and `draft_layer`, the number of the draft's first layer. RESULT: `runs`, by context `step_ms`
(wall time of a verify step, or of a token without a draft), `draft_ms` (the median of its proposals, on the device),
`kernels`, the part of both in which a GPU computes, and `prefill_s`; `groups`, what the KV cache keeps; `kv_tokens`,
the tokens that fit; `memory_gib` in use on the device; `versions`; `seconds`.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, where its draft can be timed
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""Environment variables, where they are not set."""
PROPOSERS = (
    ("vllm.v1.spec_decode.llm_base_proposer", "SpecDecodeBaseProposer"),
    ("vllm.v1.spec_decode.eagle", "EagleProposer"),
    ("vllm.v1.worker.gpu.spec_decode.autoregressive.speculator", "AutoRegressiveSpeculator"),
    ("vllm.v1.worker.gpu.spec_decode.dflash.speculator", "DFlashSpeculator"),
)
"""Modules and classes whose `propose` makes the draft tokens of a step, in vLLM's two runners."""
_FIRST_ID = 100
_RANGE = "draft proposal"
"""The name that the draft's work has in a profile."""
_PROFILED_TOKENS = 16


class DraftClock:
    """Times every call of a proposer, by events on a GPU, by the clock on a CPU."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.on_gpu = torch.cuda.is_available()
        self.calls: list[Any] = []
        wrapped: set[Any] = set()
        for module, name in PROPOSERS:
            try:
                found = getattr(__import__(module, fromlist=[name]), name)
            except Exception:  # a build without this runner may fail in any way as it is imported
                continue
            owner = next((base for base in found.__mro__ if "propose" in vars(base)), None)
            if owner is not None and owner not in wrapped:
                wrapped.add(owner)
                self._wrap(owner)

    def _wrap(self, owner: Any) -> None:
        propose = owner.propose

        def timed(proposer: Any, *arguments: Any, **named: Any) -> Any:
            before = self._now()
            with self.torch.profiler.record_function(_RANGE):
                found = propose(proposer, *arguments, **named)
            self.calls.append((before, self._now()))
            return found

        owner.propose = timed

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event: Any = self.torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def median_ms(self, steps: int) -> float | None:
        """The median of the last `steps` calls; None without any. Those before them belong to the prompt's pieces."""
        calls = self.calls[max(0, len(self.calls) - steps) :]
        if self.on_gpu:
            self.torch.cuda.synchronize()
            times = [before.elapsed_time(after) for before, after in calls]
        else:
            times = [1000 * (after - before) for before, after in calls]
        return statistics.median(times) if times else None


def timed_run(engine: Any, clock: DraftClock, context: int, tokens: int, vocabulary: int) -> dict[str, Any]:
    """Decode `tokens` behind a random prompt of `context` tokens, and only one behind it: the rest is decoding."""
    seconds = {}
    for count in (8, 1, tokens):  # the first one compiles
        clock.calls.clear()
        before, started = _steps(engine), time.perf_counter()
        generate(engine, context, count, vocabulary)
        seconds[count] = time.perf_counter() - started
        steps = (_steps(engine) - before) or count - 1
    draft_ms = clock.median_ms(steps)
    return {
        "step_ms": 1000 * (seconds[tokens] - seconds[1]) / max(1, steps),
        "draft_ms": draft_ms,
        "kernels": kernel_times(engine, context, vocabulary),
        "prefill_s": seconds[1],
        "steps": steps,
    }


def kernel_times(engine: Any, context: int, vocabulary: int) -> dict[str, float] | None:
    """Return `times_in_trace` of a few verify steps; None without a GPU or a draft.

    What the host needs to launch kernels is no part of them.
    """
    import tempfile

    import torch
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        before = _steps(engine)
        generate(engine, context, _PROFILED_TOKENS, vocabulary)
        torch.cuda.synchronize()
        verified = _steps(engine) - before
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiled.export_chrome_trace(file.name)
        return times_in_trace(json.loads(Path(file.name).read_text())["traceEvents"], verified)


def times_in_trace(events: list[dict[str, Any]], verified: int) -> dict[str, float] | None:
    """Return the milliseconds of kernels per verify step, `step_kernel_ms`, and in the draft, `draft_kernel_ms`.

    `events` are those of a Chrome trace; times in it are microseconds. Each of the `verified` steps ends with a
    proposal, and the proposals before them belong to the pieces of the prompt: steps are counted from the end of the
    last of these to the end of the last one of all. None where there are not more proposals than steps, or no step.
    """
    ranges = sorted(
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("cat") == "gpu_user_annotation" and event.get("name") == _RANGE
    )
    if not 0 < verified < len(ranges):
        return None
    steps = ranges[-verified:]
    began = ranges[-verified - 1][1]
    kernels = [
        (event["ts"], event["dur"])
        for event in events
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and began <= event["ts"] < ranges[-1][1]
    ]
    in_draft = sum(dur for at, dur in kernels if any(begin <= at < end for begin, end in steps))
    return {
        "step_kernel_ms": sum(dur for _, dur in kernels) / len(steps) / 1000,
        "draft_kernel_ms": in_draft / len(steps) / 1000,
    }


def generate(engine: Any, context: int, tokens: int, vocabulary: int) -> None:
    """Answer a random prompt of `context` tokens, always the same one, with `tokens` tokens."""
    from vllm import SamplingParams

    draw = random.Random(context)
    prompt = {"prompt_token_ids": [draw.randrange(_FIRST_ID, vocabulary) for _ in range(context)]}
    engine.generate([prompt], SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True), use_tqdm=False)


def _steps(engine: Any) -> int:
    found = [item for item in engine.get_metrics() if item.name == "vllm:spec_decode_num_drafts"]
    return int(found[0].value) if found else 0


def kept_in_cache(engine: Any, draft_layer: int) -> tuple[list[dict[str, Any]], int]:
    """Return what each group of layers keeps in the KV cache, and the number of blocks.

    vLLM numbers the draft's layers behind the verifier's, from `draft_layer` on.
    """
    config = engine.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
    groups = []
    for group in config.kv_cache_groups:
        spec = group.kv_cache_spec
        groups.append(
            {
                "spec": type(spec).__name__,
                "layers": len(group.layer_names),
                "block_tokens": spec.block_size,
                "page_bytes": spec.page_size_bytes,
                "window": getattr(spec, "sliding_window", None),
                "of_draft": any(f".layers.{draft_layer}." in name for name in group.layer_names),
            }
        )
    return groups, int(config.num_blocks)


def main() -> None:
    """Run the request, and write the result."""
    os.environ |= {name: value for name, value in SETTINGS.items() if name not in os.environ}
    request, result = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    started = time.monotonic()
    import torch
    import vllm

    clock = DraftClock()
    engine = vllm.LLM(model=request["model"], skip_tokenizer_init=True, **request["options"])
    ready = time.monotonic()
    result.with_suffix(".started").write_text("")
    vocabulary = engine.llm_engine.model_config.get_vocab_size()
    runs = {
        str(context): timed_run(engine, clock, context, request["tokens"], vocabulary)
        for context in request["contexts"]
    }
    groups, blocks = kept_in_cache(engine, request["draft_layer"])
    free, total = torch.cuda.mem_get_info() if torch.cuda.is_available() else (0, 0)
    body = {
        "runs": runs,
        "groups": groups,
        "blocks": blocks,
        "kv_tokens": blocks // len(groups) * min(group["block_tokens"] for group in groups),  # as vLLM logs it
        "memory_gib": (total - free) / 2**30,
        "versions": {"vllm": vllm.__version__, "torch": torch.__version__},
        "seconds": {"start": round(ready - started, 1), "work": round(time.monotonic() - ready, 1)},
    }
    partial = result.with_suffix(".partial")
    partial.write_text(json.dumps(body))
    partial.replace(result)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
