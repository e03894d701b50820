"""A real HTTP server on loopback that extracts hidden states as vLLM does, from a verifier that transformers runs.

By vLLM 0.32, its answers read off a running one: while a request runs there is a lock file, which the server holds; the
answer names the file of states; then the file is written, and the lock let go.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from draftcache.capture.verifier.head import head_logits
from draftcache.capture.verifier.load import Verifier
from support.loopback_server import JsonHandler, serving

Tensors = dict[str, torch.Tensor]


@dataclass
class StatesServer:
    """What the server does; a test may change it while it runs."""

    verifier: Verifier
    folder: Path
    ids: tuple[int, ...]
    """Layer ids of the states: k is the output of block k - 1."""
    max_model_len: int = 512
    models: list[str] = field(default_factory=lambda: ["served"])
    version: str | None = "0.32.0"
    extracts: bool = True
    locks: bool = True
    change: Callable[[int, Tensors], Tensors | None] = lambda _number, tensors: tensors
    """What becomes of a file's tensors, by the request's number from 1; None: writing fails."""
    fault: Callable[[int], int | None] = lambda _number: None
    """The status of the answer to a request, where it is no 200."""
    seconds: float = 0.0
    """Between a request and its answer, and between the answer and its file."""
    named_folder: Path | None = None
    """The folder in the paths of the answers, where it is another one."""
    url: str = ""
    prompts: list[list[int]] = field(default_factory=list)
    """In the order in which they came."""
    running: int = 0
    most_running: int = 0
    _lock: Any = field(default_factory=threading.Lock)

    def get(self, path: str) -> tuple[int, Any]:
        """The answer to a GET request."""
        if path == "/version" and self.version is not None:
            return 200, {"version": self.version}
        if path == "/v1/models":
            card = {"object": "model", "owned_by": "vllm", "root": "/models/served", "max_model_len": 512}
            return 200, {"object": "list", "data": [{"id": name, **card} for name in self.models]}
        return 404, {"detail": "Not Found"}

    def post(self, path: str, payload: dict[str, Any]) -> tuple[int, Any, Callable[[], None]]:
        """The answer to a POST request, and what happens after it was sent."""
        assert path == "/v1/completions"
        assert (payload["max_tokens"], payload["logprobs"], payload["model"]) == (1, 5, self.models[0])
        assert payload["return_tokens_as_token_ids"]
        prompt = payload["prompt"]
        with self._lock:
            self.prompts.append(prompt)
            number = len(self.prompts)
        if status := self.fault(number):
            return status, {"error": {"message": "on purpose", "type": "Error", "code": status}}, lambda: None
        if len(prompt) >= self.max_model_len:
            message = (
                f"This model's maximum context length is {self.max_model_len} tokens. However, your prompt contains "
                f"{len(prompt)} input tokens, which exceeds this limit even without any output tokens."
            )
            error = {"message": message, "type": "BadRequestError", "param": "input_tokens", "code": 400}
            return 400, {"error": error}, lambda: None
        name = f"cmpl-{uuid.uuid4().hex[:16]}-0-{uuid.uuid4().hex[:8]}"
        body: dict[str, Any] = {
            "id": name, "object": "text_completion", "model": payload["model"], "kv_transfer_params": None,
            "choices": [{"index": 0, "text": "a", "finish_reason": "length", "stop_reason": None}],
            "usage": {"prompt_tokens": len(prompt), "total_tokens": len(prompt) + 1, "completion_tokens": 1},
        }  # fmt: skip
        if not self.extracts:
            body["choices"][0]["logprobs"] = {"tokens": ["token_id:5"], "top_logprobs": [{"token_id:5": -1.0}]}
            return 200, body, lambda: None
        path_here = self.folder / f"{name}.safetensors"
        named = (self.named_folder or self.folder) / path_here.name
        write, likely = self._extract(number, prompt, path_here)
        body["choices"][0]["logprobs"] = {"tokens": [next(iter(likely))], "top_logprobs": [likely]}
        return 200, body | {"kv_transfer_params": {"hidden_states_path": str(named)}}, write

    def _extract(self, number: int, prompt: list[int], path: Path) -> tuple[Callable[[], None], dict[str, float]]:
        self.folder.mkdir(parents=True, exist_ok=True)
        held = -1
        if self.locks:
            held = os.open(f"{path}.lock", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
            fcntl.flock(held, fcntl.LOCK_EX)
        with self._lock, torch.inference_mode():
            states = self.verifier.forward(torch.tensor(prompt), tuple(number - 1 for number in self.ids))
            top = torch.log_softmax(
                head_logits(states.final[-1:], self.verifier.head, self.verifier.head_form)[0], -1
            ).topk(5)
        likely = {f"token_id:{item}": float(value) for item, value in zip(top.indices, top.values, strict=True)}
        stacked = torch.stack([states.taps[number - 1] for number in self.ids], 1)
        tensors = self.change(number, {"hidden_states": stacked, "token_ids": torch.tensor(prompt)})

        def write() -> None:
            time.sleep(self.seconds)
            if tensors is not None:
                save_file({name: value.contiguous() for name, value in tensors.items()}, path)
            if self.locks:
                os.close(held)

        return write, likely

    def count(self, change: int) -> None:
        """Count a request that begins (1) or whose answer was sent (-1)."""
        with self._lock:
            self.running += change
            self.most_running = max(self.most_running, self.running)


@contextmanager
def states_server(
    verifier: Verifier, folder: Path, ids: tuple[int, ...], port: int = 0, **settings: Any
) -> Iterator[StatesServer]:
    """Run a server on loopback until the block ends."""
    server = StatesServer(verifier, folder, ids, **settings)

    class Handler(JsonHandler):
        def get(self) -> None:
            self.send(*server.get(self.path))

        def post(self) -> None:
            payload = self.payload()
            server.count(1)
            status, body, after = server.post(self.path, payload)
            time.sleep(server.seconds)
            server.count(-1)
            self.send(status, body)
            after()

    with serving(Handler, port) as server.url:
        yield server
