"""A real HTTP server on loopback that speaks OpenAI's API, with a deterministic stand-in for a model, and with faults.

An answer is a text of a few words, by the hash of the prompt's ids (and of the seed, where tokens are sampled).
"""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from support.loopback_server import JsonHandler, serving

MODEL = "stand-in"
WORDS = ["The", " quick", " brown", " fox", " jumps", " Paris", " return a + b", " because", ".", " 東京", "\n", " !!!"]


@dataclass
class AnswerServer:
    """What the server does; a test may change it while it runs."""

    tokenizer: Path
    models: list[dict[str, Any]] = field(default_factory=lambda: [{"id": MODEL, "max_model_len": 4096}])
    returns_ids: bool = True
    takes_more: bool = True  # fields that OpenAI's API does not know
    answered_by: str = MODEL
    finish: dict[str, Any] = field(default_factory=lambda: {"finish_reason": "stop", "stop_reason": None})
    fault: Callable[[int, dict[str, Any]], str | None] = lambda _number, _payload: None
    """What goes wrong with a request, by its number from 1 and its payload: a status such as "503", or one of reset,
    truncated, hang, garbage and empty."""
    change: Callable[[dict[str, Any]], None] = lambda _choice: None
    """Changes a choice before it is sent."""
    seconds: float = 0.0  # of each answer
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    """Payloads in the order in which they came, but those for one token, by which a job tries the server."""
    headers: list[dict[str, str]] = field(default_factory=list)
    _lock: Any = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        from tokenizers import Tokenizer

        self.backend = Tokenizer.from_file(str(self.tokenizer / "tokenizer.json"))
        self.eos = self.backend.token_to_id("<|im_end|>")

    def text(self, prompt: list[int], payload: dict[str, Any]) -> str:
        """The answer to these ids."""
        seed = payload.get("seed", 0)
        digest = xxhash.xxh3_128_digest(json.dumps([prompt, seed]).encode())
        return "".join(WORDS[byte % len(WORDS)] for byte in digest[: 4 + digest[0] % 12])

    def body(self, payload: dict[str, Any]) -> dict[str, Any]:
        """The response to a request."""
        chat = "messages" in payload
        prompt = self.rendered(payload["messages"]) if chat else payload["prompt"]
        text = self.text(prompt, payload)
        ids = [*self.backend.encode(text, add_special_tokens=False).ids, self.eos]
        choice: dict[str, Any] = {"index": 0, **self.finish}
        if choice["finish_reason"] == "length":
            ids.pop()
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        if self.returns_ids:
            choice |= {"token_ids": ids, "prompt_token_ids": prompt}
        self.change(choice)
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
        return {"model": self.answered_by, "choices": [choice], "usage": usage}

    def rendered(self, messages: list[dict[str, Any]]) -> list[int]:
        """The ids of messages, as the ChatML template renders them."""
        text = "".join(f"<|im_start|>{item['role']}\n{item['content']}<|im_end|>\n" for item in messages)
        ids: list[int] = self.backend.encode(text + "<|im_start|>assistant\n", add_special_tokens=False).ids
        return ids


@contextmanager
def answer_server(tokenizer: Path, port: int = 0, **settings: Any) -> Iterator[AnswerServer]:
    """Run a server on loopback until the block ends."""
    server = AnswerServer(tokenizer, **settings)

    class Handler(JsonHandler):
        def get(self) -> None:
            found = server.fault(0, {}) if self.path == "/v1/models" else "404"
            self.send(int(found or 200), {"data": server.models} if not found else {"message": "no"})

        def post(self) -> None:
            payload = self.payload()
            tried = payload["max_tokens"] > 1
            with server._lock:
                if tried:
                    server.requests.append(payload)
                    server.headers.append(dict(self.headers))
                number = len(server.requests)
            if not server.takes_more and "return_token_ids" in payload:
                return self.send(400, {"error": {"message": "unknown field return_token_ids"}})
            _respond(self, server, payload, server.fault(number, payload) if tried else None)
            return None

    with serving(Handler, port) as url:
        server.url = f"{url}/v1"
        yield server


def _respond(handler: JsonHandler, server: AnswerServer, payload: dict[str, Any], fault: str | None) -> None:
    if fault is not None and fault.isdecimal():
        return handler.send(int(fault), {"error": {"message": f"fault {fault} on purpose"}})
    if fault == "hang":
        time.sleep(2.0)
        return None
    if fault == "reset":
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        handler.close_connection = True
        handler.rfile.close()  # it holds the socket open
        handler.connection.close()
        return None
    time.sleep(server.seconds)
    if fault in ("garbage", "empty"):
        return handler.send(200, '{"model": ' if fault == "garbage" else {"choices": []})
    return handler.send(200, server.body(payload), cut=fault == "truncated")
