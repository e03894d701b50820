"""Against a real SGLang: exports that it serves by their model card's command take the verify steps that were counted.

Set DRAFTCACHE_SGLANG_PYTHON to an interpreter that has SGLang, and DRAFTCACHE_SGLANG_FLAGS to further flags of its
server where this machine needs some, then `pytest -m slow tests/test_sglang.py`. On a CPU 0.5.12.post1 was run, by
what support/sglang_on_cpu gives it. A verify step takes a second there, so few texts are compared, and no DFlash: that
version does not read RoPE's base of one, and SGLang hands it embeddings in bfloat16, which Triton's interpreter lacks.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from draftcache.draft_train.export import export
from draftcache.tools.cli import main
from draftcache.tools.engine_check.drafts import captured, trained, wrong_export
from draftcache.tools.engine_check.subjects import LLAMA_VOCABULARY, Subject, llama_subject
from draftcache.tools.running_engine import RunningEngine
from draftcache.tools.truth import SPLIT

PYTHON = os.environ.get("DRAFTCACHE_SGLANG_PYTHON", "")
ON_GPU = torch.cuda.is_available()
ON_CPU = (
    "--device cpu --dtype float32 --attention-backend triton --triton-attention-num-kv-splits 1 --sampling-backend "
    "pytorch --grammar-backend none --disable-cuda-graph --disable-piecewise-cuda-graph --disable-overlap-schedule "
    "--skip-server-warmup --mem-fraction-static 0.2 --max-total-tokens 4096"
)
FLAGS = shlex.split(os.environ.get("DRAFTCACHE_SGLANG_FLAGS", "" if ON_GPU else ON_CPU))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not PYTHON, reason="set DRAFTCACHE_SGLANG_PYTHON to an interpreter that has SGLang"),
]
DRAFT_TOKENS, START_S = 4, 400
PROMPTS, TOKENS = (48, 60) if ON_GPU else (8, 30)
MOST_APART = 0.01 if ON_GPU else 0.03
"""Of so few texts one verify step is more than 1 %."""
CPU_MEANS = Path(__file__).parent / "support" / "sglang_on_cpu"


@contextmanager
def serving(words: Sequence[str], log: Path) -> Iterator[str]:
    """Run SGLang's server with these words behind `python` until the block ends, and yield its URL."""
    port = _free_port()
    command = [PYTHON, *words, "--host", "127.0.0.1", "--port", str(port), "--disable-radix-cache", *FLAGS]
    means = {"PYTHONPATH": str(CPU_MEANS), "TRITON_INTERPRET": "1", "SGLANG_USE_CPU_ENGINE": "1"}
    started: dict[str, Any] = {"start_new_session": True, "env": os.environ | ({} if ON_GPU else means)}
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file, **started) as process:
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_S
            while not _answers(f"{url}/health"):
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < deadline, log.read_text()[-4000:]
                time.sleep(1)
            yield url
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)


def _free_port() -> int:
    """A port that nobody listens at; SGLang takes the one 10,000 above it too."""
    while True:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = int(free.getsockname()[1])
        if port < 55_000:
            return port


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def plain_answers(subject: Subject, log: Path) -> list[list[int]]:
    """SGLang's own greedy text, without a draft."""
    found = []
    with serving(["-m", "sglang.launch_server", "--model-path", str(subject.verifier)], log) as url:
        for prompt in subject.prompts:
            sampling = {"temperature": 0.0, "max_new_tokens": TOKENS, "ignore_eos": True}
            body = json.dumps({"input_ids": list(prompt), "sampling_params": sampling}).encode()
            request = urllib.request.Request(f"{url}/generate", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=120) as answer:
                found.append([int(number) for number in json.load(answer)["output_ids"]])
    return found


def version_of() -> str:
    told = "import importlib.metadata; print(importlib.metadata.version('sglang'))"
    return subprocess.run([PYTHON, "-c", told], capture_output=True, text=True, check=True).stdout.split()[-1]


def card_command(draft: Path, served: Path) -> list[str]:
    """The words behind `python` of the command in a draft's model card, with `served` in the draft's place."""
    text = (draft / "README.md").read_text(encoding="utf-8")
    found = re.search(r"```\npython (-m sglang\.launch_server .*?)\n```", text, re.DOTALL)
    assert found is not None, text
    return [str(served) if word == "DRAFT" else word for word in shlex.split(found[1].replace("\\\n", " "))]


@pytest.mark.parametrize("name", ["eagle3", "eagle31", "dflash-full"] if ON_GPU else ["eagle3", "eagle31"])
def test_sglang_takes_the_verify_steps_that_eval_counts(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Texts that it decodes with the draft are those that it decodes without; a wrong export takes more steps."""
    subject = llama_subject(tmp_path / "verifier", PROMPTS, steps=400 if ON_GPU else 300)
    whole = {"draft_vocab_size": LLAMA_VOCABULARY} if name == "dflash-full" else {}
    subject = replace(subject, training={**subject.training, "sliding_window": 0}, **whole)
    traces = list(zip(subject.prompts, plain_answers(subject, tmp_path / "plain.log"), strict=True))
    store = captured(traces, subject, tmp_path / "traces", dtype="float32", device="cpu")
    checkpoint = trained(name, subject, store, tmp_path / "run", draft_tokens=DRAFT_TOKENS, device="auto")
    draft = export(
        checkpoint, tmp_path / "draft", engine="sglang", engine_version=version_of(),
        base_model=str(subject.verifier), dtype="bfloat16" if ON_GPU else "float32",
    )  # fmt: skip
    wrong, _ = wrong_export(draft, tmp_path / "wrong")

    def counted(served: Path) -> dict[str, Any]:
        with serving(card_command(draft, served), tmp_path / f"{served.name}.log") as url:
            with RunningEngine(url) as engine:
                one = engine.answer(list(subject.prompts[0]), 1)
            assert (len(one.token_ids), one.verify_steps) == (1, 0)
            words = ["eval", "--store", store.location, "--checkpoint", str(checkpoint), "--splits", SPLIT,
                     "--device", "cpu", "--resamples", "100", "--draft-tokens", str(DRAFT_TOKENS), "--engine", url,
                     "--engine-conversations", str(PROMPTS), "--json"]  # fmt: skip
            capsys.readouterr()
            main(words)
        found: dict[str, Any] = json.loads(capsys.readouterr().out)["engine"]
        print(served.name, json.dumps(found))
        return found

    right = counted(draft)
    assert right["engine"] == "sglang"
    assert right["conversations_of_equal_text"] >= 0.9 * PROMPTS
    apart = abs(right["engine_verify_steps"] - right["offline_verify_steps"]) / right["offline_verify_steps"]
    assert apart <= MOST_APART
    assert right["engine_acceptance_length"] > 1.25  # drafts are accepted, so that the equality says something
    assert right["engine_drafted"] == DRAFT_TOKENS * right["engine_verify_steps"]
    accepted = sum(right["engine_accepted_by_position"]) - (right["tokens"] - right["engine_verify_steps"])
    assert 0 <= accepted <= DRAFT_TOKENS * PROMPTS  # those of the last steps that lie beyond an answer's end
    off = counted(wrong)
    assert off["engine_verify_steps"] / off["tokens"] > 1.05 * right["engine_verify_steps"] / right["tokens"]
