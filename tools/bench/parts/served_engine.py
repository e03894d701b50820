"""Times a draft inside vLLM: `PYTHON served_engine.py REQUEST RESULT`, both JSON, under an interpreter that has vLLM.

It imports nothing of draftcache. REQUEST: `model`, `options` (of `vllm.LLM`), `contexts` (lengths of prompts),
`tokens` (of each answer) and `draft_layer`, the number of the draft's first layer. RESULT: `runs`, by context `step_ms`
(wall time of a verify step, or of a token without a draft), `draft_ms` (the median of its proposals, on the device) and
`prefill_s`; `groups`, what the KV cache keeps; `kv_tokens`, the tokens that fit; `memory_gib` in use on the device;
`versions`; `seconds`.
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

    def median_ms(self) -> float | None:
        """The median of all calls but the first, which proposes after the prompt; None without a second."""
        if self.on_gpu:
            self.torch.cuda.synchronize()
            times = [before.elapsed_time(after) for before, after in self.calls[1:]]
        else:
            times = [1000 * (after - before) for before, after in self.calls[1:]]
        return statistics.median(times) if times else None


def timed_run(engine: Any, clock: DraftClock, context: int, tokens: int, vocabulary: int) -> dict[str, Any]:
    """Decode `tokens` behind a random prompt of `context` tokens, and only one behind it: the rest is decoding."""
    from vllm import SamplingParams

    draw = random.Random(context)
    prompt = {"prompt_token_ids": [draw.randrange(_FIRST_ID, vocabulary) for _ in range(context)]}
    seconds = {}
    for count in (8, 1, tokens):  # the first one compiles
        clock.calls.clear()
        before, started = _steps(engine), time.perf_counter()
        engine.generate([prompt], SamplingParams(temperature=0, max_tokens=count, ignore_eos=True), use_tqdm=False)
        seconds[count] = time.perf_counter() - started
        steps = (_steps(engine) - before) or count - 1
    return {
        "step_ms": 1000 * (seconds[tokens] - seconds[1]) / max(1, steps),
        "draft_ms": clock.median_ms(),
        "prefill_s": seconds[1],
        "steps": steps,
    }


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
