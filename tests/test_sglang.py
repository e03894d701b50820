"""Against a real SGLang: exports that it serves by their model card's command take the verify steps that were counted.

Set DRAFTCACHE_SGLANG_PYTHON to an interpreter that has SGLang, and DRAFTCACHE_SGLANG_FLAGS to further flags of its
server where this machine needs some, then `pytest -m slow tests/test_sglang.py`. On a CPU 0.5.12.post1 and 0.5.23 were
run, by what support/sglang_on_cpu gives them. A verify step takes up to a second there, so few texts are compared.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from draftcache.draft_train.drafts.serving_target import SGLANG_DEEPSEEK_CHANGE, ServingTarget, sglang_dflash_needs
from draftcache.draft_train.export import export
from draftcache.store.reader import StoreReader
from draftcache.tools.cli import main
from draftcache.tools.demo.pipeline import VERIFIER
from draftcache.tools.engine_check.drafts import captured, trained, wrong_export
from draftcache.tools.engine_check.subjects import LLAMA_VOCABULARY, Subject, llama_subject
from draftcache.tools.running_engine import RunningEngine
from draftcache.tools.truth import SPLIT, opening_prompts

PYTHON = os.environ.get("DRAFTCACHE_SGLANG_PYTHON", "")
ON_GPU = torch.cuda.is_available()
ON_CPU = (
    "--device cpu --dtype float32 --attention-backend triton --triton-attention-num-kv-splits 1 --sampling-backend "
    "pytorch --grammar-backend none --disable-cuda-graph --disable-overlap-schedule --skip-server-warmup "
    "--mem-fraction-static 0.2 --max-total-tokens 4096"
)
FLAGS = shlex.split(os.environ.get("DRAFTCACHE_SGLANG_FLAGS", "" if ON_GPU else ON_CPU))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not PYTHON, reason="set DRAFTCACHE_SGLANG_PYTHON to an interpreter that has SGLang"),
]
DRAFT_TOKENS, START_S = 4, 400
EXPORTED = "bfloat16" if ON_GPU else "float32"
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


def save_deepseek(directory: Path) -> None:
    """Save a small DeepSeek V3 without experts, in widths that SGLang's attention has kernels for.

    Its embeddings are large, as those of the small Llama are, so that a draft can learn its texts.
    """
    from transformers import AutoTokenizer, DeepseekV3Config, DeepseekV3ForCausalLM, set_seed

    set_seed(0)
    config = DeepseekV3Config(
        num_hidden_layers=7, first_k_dense_replace=7, vocab_size=LLAMA_VOCABULARY, hidden_size=128,
        intermediate_size=256, num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=256, q_lora_rank=None,
        qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=32, n_routed_experts=8, num_experts_per_tok=2, n_group=1,
        topk_group=1, moe_intermediate_size=64, max_position_embeddings=512, initializer_range=0.06, bos_token_id=0,
        eos_token_id=1, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.32)
    torch.nn.init.normal_(model.lm_head.weight, std=0.08)
    model.to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(VERIFIER).save_pretrained(directory)
    config_file = directory / "config.json"  # SGLang reads what this configuration leaves out
    read = {"moe_layer_freq": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | read))


def captured_answers(subject: Subject, directory: Path) -> StoreReader:
    traces = list(zip(subject.prompts, plain_answers(subject, directory / "plain.log"), strict=True))
    return captured(traces, subject, directory / "traces", dtype="float32", device="cpu")


def require_counted_steps(
    store: StoreReader,
    checkpoint: Path,
    right: Sequence[str],
    wrong: Sequence[str],
    logs: Path,
    most: float = MOST_APART,
) -> None:
    """Require of SGLang the verify steps that are counted offline where it is started with the words `right`, up to the
    share `most` of them, and more with the words `wrong`.
    """

    def counted(name: str, words: Sequence[str]) -> dict[str, Any]:
        with serving(words, logs / f"{name}.log") as url:
            with RunningEngine(url) as engine:
                one = engine.answer(opening_prompts(store, [SPLIT], 1)[0], 1)
            assert (len(one.token_ids), one.verify_steps) == (1, 0)
            asked = ["eval", "--store", store.location, "--checkpoint", str(checkpoint), "--splits", SPLIT,
                     "--device", "cpu", "--resamples", "100", "--draft-tokens", str(DRAFT_TOKENS), "--engine", url,
                     "--engine-conversations", str(PROMPTS), "--json"]  # fmt: skip
            with redirect_stdout(StringIO()) as printed:
                main(asked)
        found: dict[str, Any] = json.loads(printed.getvalue())["engine"]
        print(name, json.dumps(found))
        return found

    on = counted("right", right)
    assert on["engine"] == "sglang"
    assert on["conversations_of_equal_text"] >= 0.9 * PROMPTS
    apart = abs(on["engine_verify_steps"] - on["offline_verify_steps"]) / on["offline_verify_steps"]
    assert apart <= most
    assert on["engine_acceptance_length"] > 1.25  # drafts are accepted, so that the equality says something
    assert on["engine_drafted"] == DRAFT_TOKENS * on["engine_verify_steps"]
    accepted = sum(on["engine_accepted_by_position"]) - (on["tokens"] - on["engine_verify_steps"])
    assert 0 <= accepted <= DRAFT_TOKENS * PROMPTS  # those of the last steps that lie beyond an answer's end
    off = counted("wrong", wrong)
    assert off["engine_verify_steps"] / off["tokens"] > 1.05 * on["engine_verify_steps"] / on["tokens"]


@pytest.mark.parametrize("name", ["eagle3", "eagle31", "dflash-full", "dflash"])
def test_sglang_takes_the_verify_steps_that_eval_counts(name: str, tmp_path: Path) -> None:
    """Texts that it decodes with the draft are those that it decodes without; a wrong export takes more steps."""
    target = ServingTarget(engine="sglang", version=version_of())
    block = name.startswith("dflash")
    needed = [since for since, _ in sglang_dflash_needs(name == "dflash", 10_000.0).values()] if block else []
    if not all(map(target.since, needed)):
        pytest.skip(f"SGLang {target.version} does not read all that a DFlash draft is: {' and '.join(needed)} do")
    subject = llama_subject(tmp_path / "verifier", PROMPTS, steps=400 if ON_GPU else 300)
    window = subject.window if name == "dflash" else 0  # an Eagle3 draft's has its own test
    whole = {"draft_vocab_size": LLAMA_VOCABULARY} if block else {}
    subject = replace(subject, training={**subject.training, "sliding_window": window}, **whole)
    store = captured_answers(subject, tmp_path)
    checkpoint = trained(name, subject, store, tmp_path / "run", draft_tokens=DRAFT_TOKENS, device="auto")
    draft = export(
        checkpoint, tmp_path / "draft", engine="sglang", engine_version=target.version,
        base_model=str(subject.verifier), dtype="bfloat16" if block else EXPORTED,
    )  # fmt: skip
    if block and not ON_GPU:  # with weights in bfloat16 it proposes otherwise here and there
        exact = export(checkpoint, tmp_path / "exact", engine="vllm", base_model=str(subject.verifier), dtype=EXPORTED)
        shutil.copy(exact / "model.safetensors", draft)
    wrong, _ = wrong_export(draft, tmp_path / "wrong")
    require_counted_steps(store, checkpoint, card_command(draft, draft), card_command(draft, wrong), tmp_path)


def test_sglang_takes_a_deepseek_s_aux_ids_as_its_version_does(tmp_path: Path) -> None:
    """It changed what they stand for: the export for versions before the change, or from it on, takes more steps."""
    target = ServingTarget(engine="sglang", version=version_of())
    save_deepseek(tmp_path / "verifier")
    subject = llama_subject(tmp_path / "verifier", PROMPTS, steps=400 if ON_GPU else 300)
    subject = replace(subject, layers=(2, 3, 4), training={**subject.training, "sliding_window": 0})
    store = captured_answers(subject, tmp_path)
    checkpoint = trained("eagle3", subject, store, tmp_path / "run", draft_tokens=DRAFT_TOKENS, device="auto")
    versions = {"draft": target.version, "other": "0.5.12" if target.since(SGLANG_DEEPSEEK_CHANGE) else "0.5.13"}
    draft, other = (
        export(
            checkpoint, tmp_path / name, engine="sglang", engine_version=version, base_model=str(subject.verifier),
            dtype=EXPORTED,
        )
        for name, version in versions.items()
    )  # fmt: skip
    require_counted_steps(store, checkpoint, card_command(draft, draft), card_command(draft, other), tmp_path)


def test_sglang_takes_an_eagle3_s_window_from_its_command(tmp_path: Path) -> None:
    """Without the model card's flag the draft attends to everything.

    In the later steps of a draft SGLang's Triton attention counts the query itself into the window, so that they see
    one position less: of a window of 24 that is noticed, of one of thousands it would not be.
    """
    target = ServingTarget(engine="sglang", version=version_of())
    if not ON_GPU and not target.since("0.5.23"):
        pytest.skip("Triton's attention of this SGLang has no window in the steps of a draft")
    subject = llama_subject(tmp_path / "verifier", PROMPTS, steps=400 if ON_GPU else 300)
    store = captured_answers(subject, tmp_path)
    checkpoint = trained("eagle3", subject, store, tmp_path / "run", draft_tokens=DRAFT_TOKENS, device="auto")
    draft = export(
        checkpoint, tmp_path / "draft", engine="sglang", engine_version=target.version,
        base_model=str(subject.verifier), dtype=EXPORTED,
    )  # fmt: skip
    words = card_command(draft, draft)
    flag = words.index("--speculative-draft-window-size")
    assert int(words[flag + 1]) == subject.window - 1
    without = words[:flag] + words[flag + 2 :]
    require_counted_steps(store, checkpoint, words, without, tmp_path, most=MOST_APART if ON_GPU else 0.15)
