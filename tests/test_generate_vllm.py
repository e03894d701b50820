"""Traces from a real vLLM: its ids are those of the verifier in this process.

Set DRAFTCACHE_VLLM_PYTHON to an interpreter that has vLLM (0.32 on a CPU was run), then `pytest -m slow
tests/test_generate_vllm.py`.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from draftcache.capture.generate.config import GenerateConfig
from draftcache.capture.generate.job import generate
from draftcache.capture.generate.traces import ROWS
from support.chat_tokenizers import CHATML, save_tokenizer

PYTHON = os.environ.get("DRAFTCACHE_VLLM_PYTHON")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(PYTHON is None, reason="DRAFTCACHE_VLLM_PYTHON is not set")]


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that ends most answers, whose generation_config has a penalty and a second stop token."""
    path = tmp_path_factory.mktemp("verifiers") / "llama"
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=640, hidden_size=256, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=512, bos_token_id=0, eos_token_id=1, pad_token_id=0,
        initializer_range=0.12,
    )  # fmt: skip
    model = LlamaForCausalLM(settings)
    model.lm_head.weight.data[1] *= 1.6
    model.generation_config.eos_token_id = [1, 5]
    model.generation_config.repetition_penalty = 1.3
    model.save_pretrained(path)
    return save_tokenizer(path, CHATML)


@pytest.fixture(scope="module")
def url(verifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    assert PYTHON is not None
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(verifier), "--served-model-name", "tiny",
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    log = tmp_path_factory.mktemp("vllm") / "log"
    with log.open("wb") as file, subprocess.Popen(
        words, env={**kept, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}, stdout=file, stderr=file
    ) as process:  # fmt: skip
        address = f"http://127.0.0.1:{port}/v1"
        deadline = time.monotonic() + 400
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline
            try:
                httpx2.get(f"{address}/models", trust_env=False)
                break
            except httpx2.TransportError:
                time.sleep(1.0)
        yield address
        process.terminate()


def test_ids_are_the_verifiers_own(tmp_path: Path, verifier: Path, url: str) -> None:
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": f"what is {number}? " * (1 + number % 9)} for number in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shared: dict[str, Any] = {"splits": {"train": [path]}, "max_new_tokens": 64, "progress": False}
    served = {**shared, "server": url, "tokenizer": verifier}
    generate(GenerateConfig(output=tmp_path / "ids", **served))
    generate(GenerateConfig(output=tmp_path / "chat", chat=True, **served))
    generate(GenerateConfig(output=tmp_path / "here", verifier=verifier, compute_dtype="float32", **shared))
    ids, chat, here = ((tmp_path / name / "train" / ROWS).read_bytes() for name in ("ids", "chat", "here"))
    assert ids == chat == here
    found = [json.loads(line) for line in ids.splitlines()]
    assert {row["token_ids"][-1] for row in found if row["finish_reason"] == "stop"} <= {1, 5}
    assert len([row for row in found if row["finish_reason"] == "stop"]) > 20
