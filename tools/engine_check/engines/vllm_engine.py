"""One run of vLLM: `PYTHON vllm_engine.py REQUEST RESULT`, both JSON, under an interpreter that has vLLM.

It imports nothing of draftcache, because that interpreter need not have it. Without arguments it prints the versions
that it finds, as JSON. REQUEST: `model`, `prompts` (token ids), `max_tokens`, `batched` (all prompts in one call, or
one after the other), `options` (of `vllm.LLM`). RESULT: `outputs`, with the `token_ids`, the `hidden_states` (a path
or null) and the `proposals` of each prompt (lists of draft tokens in order, or null where no hook was called);
`counters` of speculative decoding; `hook`, the function whose results the proposals are; `versions`; `seconds` of the
start and of the work.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, where proposals can be seen
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_USE_DEEP_GEMM": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""Environment variables, where they are not set."""
DEADLINE_S = 60.0
FLUSH_PROMPT = [5, 6, 7]

Record = Callable[[list[str], list[list[int]]], None]


def versions() -> dict[str, Any]:
    """Return the versions of the engine and its libraries, and the device that it runs on."""
    import vllm  # the others take seconds

    # isort: split
    import torch
    import transformers

    has_gpu = torch.cuda.is_available()
    return {
        "engine": f"vllm {vllm.__version__}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
        "device": torch.cuda.get_device_name() if has_gpu else "cpu",
    }


def let_the_connector_run_on_a_cpu() -> None:
    """vLLM 0.32's connector copies from a GPU to pinned memory, and asks an event whether the copy is done.

    Events are vLLM's own placeholders there, once an engine has been made.
    """
    import torch

    if torch.cuda.is_available():
        return
    empty_like: Any = torch.empty_like
    torch.empty_like = lambda like, pin_memory=False, **named: empty_like(like, **named)
    torch.cuda.Event.query = lambda _event: True  # type: ignore[method-assign]


class Proposals:
    """What the engine's draft proposed, by request, in order. The engine itself returns accepted tokens only.

    vLLM has two model runners. Both make the proposals of a step for all requests of the batch, in one function each.
    """

    def __init__(self) -> None:
        self.by_request: dict[str, list[list[int]]] = {}
        self.hook: str | None = None
        self._hook_first_runner()
        self._hook_second_runner()

    def add(self, hook: str, requests: list[str], tokens: list[list[int]]) -> None:
        """Note the draft tokens of one step, a list for each request."""
        self.hook = hook
        for request, proposed in zip(requests, tokens, strict=False):
            self.by_request.setdefault(request, []).append([int(token) for token in proposed])

    def of(self, request: str) -> list[list[int]] | None:
        """Return what was proposed for a request, by the id that the caller knows."""
        for name, found in self.by_request.items():
            if name == request or name.rpartition("-")[0] == request:  # the engine adds a random part
                return found
        return None if self.hook is None else []

    def _hook_first_runner(self) -> None:
        try:
            from vllm.v1.worker.gpu_model_runner import GPUModelRunner

            propose: Any = GPUModelRunner.propose_draft_token_ids
        except Exception:  # a build without this runner may fail in any way as it is imported
            return

        def proposed(runner: Any, *arguments: Any, **named: Any) -> Any:
            found = propose(runner, *arguments, **named)
            tokens = found.tolist() if hasattr(found, "tolist") else found
            self.add("GPUModelRunner.propose_draft_token_ids", list(runner.input_batch.req_ids), tokens)
            return found

        GPUModelRunner.propose_draft_token_ids = proposed

    def _hook_second_runner(self) -> None:
        try:
            from vllm.v1.worker.gpu.spec_decode.utils import DraftTokensHandler

            handed: Any = DraftTokensHandler.set_draft_tokens
        except Exception:  # a build without this runner may fail in any way as it is imported
            return

        def set_draft_tokens(handler: Any, batch: Any, tokens: Any, *arguments: Any, **named: Any) -> Any:
            self.add("DraftTokensHandler.set_draft_tokens", list(batch.req_ids), tokens.tolist())
            return handed(handler, batch, tokens, *arguments, **named)

        DraftTokensHandler.set_draft_tokens = set_draft_tokens


def answer(engine: Any, prompts: list[list[int]], max_tokens: int, batched: bool) -> list[Any]:
    """Return the engine's greedy answers to prompts, of exactly `max_tokens` tokens."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    parts = [inputs] if batched else [[item] for item in inputs]
    answers: list[Any] = []
    for part in parts:
        answers += engine.generate(part, sampling, use_tqdm=False)
    return answers


def states_of(found: Any) -> str | None:
    """Return the file of an answer's hidden states, once it is whole; None where none were asked for."""
    path = (found.kv_transfer_params or {}).get("hidden_states_path")
    if path is None:
        return None
    deadline = time.monotonic() + DEADLINE_S
    while not Path(path).exists():
        if time.monotonic() > deadline:
            raise SystemExit(f"{path}: expected vLLM to write the hidden states within {DEADLINE_S:.0f} s")
        time.sleep(0.1)
    lock = Path(f"{path}.lock")
    if lock.exists():  # the writer holds it until the file is whole
        with lock.open() as held:
            fcntl.flock(held, fcntl.LOCK_SH)
    return str(path)


def main() -> None:
    """Answer the request's prompts, and write the result."""
    os.environ |= {name: value for name, value in SETTINGS.items() if name not in os.environ}
    if len(sys.argv) == 1:
        print(json.dumps(versions()))
        return
    request, result = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    started = time.monotonic()
    from vllm import LLM

    proposals = Proposals()
    engine = LLM(model=request["model"], **request["options"])
    let_the_connector_run_on_a_cpu()
    ready = time.monotonic()
    result.with_suffix(".started").write_text("")
    answers = answer(engine, request["prompts"], request["max_tokens"], request["batched"])
    if (request["options"].get("speculative_config") or {}).get("method") == "extract_hidden_states":
        answer(engine, [FLUSH_PROMPT], 1, True)  # states are saved in the engine's next step: give it one
    outputs = [
        {
            "token_ids": list(item.outputs[0].token_ids),
            "hidden_states": states_of(item),
            "proposals": proposals.of(item.request_id),
        }
        for item in answers
    ]
    counters = {
        item.name: getattr(item, "value", getattr(item, "values", None))
        for item in engine.get_metrics()
        if "spec_decode" in item.name
    }
    seconds = {"start": round(ready - started, 1), "work": round(time.monotonic() - ready, 1)}
    body = {"outputs": outputs, "counters": counters, "hook": proposals.hook, "seconds": seconds}
    partial = result.with_suffix(".partial")
    partial.write_text(json.dumps(body | {"versions": versions()}))
    partial.replace(result)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
