"""One run of vLLM: `PYTHON vllm_engine.py REQUEST RESULT`, both JSON, under an interpreter that has vLLM.

REQUEST: model, prompts (token ids), max_tokens, options (of `vllm.LLM`). RESULT: token_ids and hidden_states (a path or
null) of each prompt, and the counters of speculative decoding.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}

import torch
from vllm import LLM, SamplingParams

DEADLINE_S = 60.0


def let_the_connector_run_on_a_cpu() -> None:
    """vLLM 0.32's connector copies from a GPU to pinned memory, and asks an event whether the copy is done.

    Events are vLLM's own placeholders there, once an engine has been made.
    """
    if torch.cuda.is_available():
        return
    empty_like = torch.empty_like
    torch.empty_like = lambda like, pin_memory=False, **named: empty_like(like, **named)
    torch.cuda.Event.query = lambda _event: True


def main() -> None:
    """Answer the request's prompts one after the other, and write the result."""
    request = json.loads(Path(sys.argv[1]).read_text())
    engine = LLM(
        model=request["model"], dtype="float32", max_model_len=512, max_num_seqs=1, enforce_eager=True,
        enable_prefix_caching=False, disable_log_stats=False, **request["options"],
    )  # fmt: skip
    let_the_connector_run_on_a_cpu()
    sampling = SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True)
    outputs: list[dict[str, Any]] = []
    for prompt in request["prompts"]:
        (answer,) = engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        states = (answer.kv_transfer_params or {}).get("hidden_states_path")
        if states is not None:  # they are saved in the engine's next step: give it one
            engine.generate([{"prompt_token_ids": [5, 6, 7]}], sampling, use_tqdm=False)
        deadline = time.monotonic() + DEADLINE_S
        while states is not None and not Path(states).exists():
            assert time.monotonic() < deadline, "vLLM wrote no hidden states"
            time.sleep(0.1)
        outputs.append({"token_ids": list(answer.outputs[0].token_ids), "hidden_states": states})
    counters = {item.name: getattr(item, "value", None) for item in engine.get_metrics() if "spec_decode" in item.name}
    Path(sys.argv[2]).write_text(json.dumps({"outputs": outputs, "counters": counters}))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
