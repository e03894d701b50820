"""A real HTTP server on loopback that answers as vLLM or SGLang do about speculative decoding, from known turns."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from support.loopback_server import JsonHandler, serving


@dataclass
class EngineServer:
    """What the server knows, and what goes wrong with it."""

    engine: str
    turns: dict[tuple[int, ...], tuple[list[int], int]]
    """By the prompt's ids, the answer's and the verify steps that it takes. SGLang tells none for one token."""
    draft_tokens: int = 3
    models: list[str] = field(default_factory=lambda: ["stand-in"])
    speculates: bool = True
    others: int = 0
    """Tokens of somebody else's answers that each answer here comes with."""
    url: str = ""
    drafts: int = 0
    tokens: int = 0

    def metrics(self) -> str:
        """The page of counters, in two series as vLLM with two engines has it."""
        lines = ["# HELP vllm:generation_tokens_total Number of generation tokens processed.", "process_total 5.0"]
        counts = {"generation_tokens": self.tokens}
        if self.speculates:
            counts |= {
                "spec_decode_num_drafts": self.drafts,
                "spec_decode_num_draft_tokens": self.drafts * self.draft_tokens,
            }
        for name, value in counts.items():
            for engine, part in ((0, value - value // 3), (1, value // 3)):
                lines.append(f'vllm:{name}_total{{engine="{engine}",model_name="m"}} {float(part)}')
                lines.append(f'vllm:{name}_created{{engine="{engine}",model_name="m"}} 1.7e+09')
        if self.speculates:
            label = 'engine="0",model_name="m",position="1"'
            lines.append(f"vllm:spec_decode_num_accepted_tokens_per_pos_total{{{label}}} {float(self.drafts)}")
        return "\n".join(lines) + "\n"

    def get(self, path: str) -> tuple[int, Any]:
        """The answer to a GET request."""
        vllm = self.engine == "vllm"
        if path == "/metrics" and self.engine != "other":
            return 200, self.metrics() if vllm else "sglang:num_requests_total 1.0\n"
        if path == ("/version" if vllm else "/server_info") and self.engine != "other":
            return 200, {"version": "1.2.3"}
        if path == "/v1/models":
            return 200, {"data": [{"id": name} for name in self.models]}
        return 404, {"message": "no such path"}

    def post(self, path: str, payload: dict[str, Any]) -> tuple[int, Any]:
        """The answer to a POST request."""
        vllm = self.engine == "vllm"
        assert path == ("/v1/completions" if vllm else "/generate")
        sampling = payload if vllm else payload["sampling_params"]
        assert sampling["temperature"] == 0
        assert sampling["ignore_eos"]
        ids, steps = self.turns[tuple(payload["prompt" if vllm else "input_ids"])]
        assert sampling["max_tokens" if vllm else "max_new_tokens"] == len(ids)
        self.drafts += steps
        self.tokens += len(ids) + self.others
        if vllm:
            return 200, {"choices": [{"text": "", "token_ids": ids}]}
        told: dict[str, Any] = {"completion_tokens": len(ids)}
        if self.speculates and len(ids) > 1:
            told |= {
                "spec_verify_ct": steps,
                "spec_num_proposed_drafts": steps * self.draft_tokens,
                "spec_correct_drafts_histogram": [0, 1, steps - 1] if steps else [],
            }
        return 200, {"text": "", "output_ids": ids, "meta_info": told}


@contextmanager
def engine_server(
    engine: str, turns: dict[tuple[int, ...], tuple[list[int], int]], **settings: Any
) -> Iterator[EngineServer]:
    """Run a server on loopback until the block ends."""
    server = EngineServer(engine, turns, **settings)

    class Handler(JsonHandler):
        def get(self) -> None:
            self.send(*server.get(self.path))

        def post(self) -> None:
            self.send(*server.post(self.path, self.payload()))

    with serving(Handler) as server.url:
        yield server
