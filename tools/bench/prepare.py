"""Prepare's throughput beside the bare tokenizer's, on the same texts and cores.

`python -m draftcache.tools.bench.prepare [--output FILE]` measures both. The text is this Python's standard library,
cut into conversations of two to eight turns; the tokenizer is a byte-level BPE trained on it. The case `encode-batch`
is `Tokenizer.encode_batch` over the rendered texts with its threads on every core: no files, no JSON, no template, no
masks. `prepare` is the whole job from JSONL to a committed dataset, with masks by the generation prompt, the check of
every message's text and the start of its workers; a cold command adds the import of transformers, about two seconds
once. Wall time misleads if other programs share the cores, so tokens per CPU second are reported too.

`--long-rows N` measures memory instead: `draftcache prepare` in a process of its own over N conversations of about
`--row-tokens` tokens, and over a tenth of them. The rows `prepare-long` and `prepare-long-tenth` give the highest sum
of the proportional set sizes of the command and its workers; constant memory means a ratio near 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from draftcache.tools.result_rows import cpu_name, report, result_row

_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Of Python source with a vocabulary of 32k trained on it, measured; only the rows' length depends on it.
_CHARACTERS_PER_TOKEN = 4.2


def main() -> None:
    """Run both cases, alternating, and report the best of each and their ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FILE")
    parser.add_argument("--megabytes", type=float, default=64.0, help="conversation text (%(default)s)")
    parser.add_argument("--vocab-size", type=int, default=32000, help="of the tokenizer (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--long-rows", type=int, metavar="N", help="measure memory over N long conversations instead")
    parser.add_argument("--row-tokens", type=int, default=14000, help="of a long conversation, about (%(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        rows = (measure_memory if arguments.long_rows else measure)(Path(directory), arguments)
    report(rows, arguments.output)


def measure(directory: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return result rows: the best repeat of both cases, and prepare's share of encode_batch."""
    train_tokenizer(directory / "tokenizer", arguments.vocab_size)
    conversations = list(python_conversations(int(arguments.megabytes * 1e6)))
    with (directory / "rows.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"messages": messages}) + "\n" for messages in conversations)
    runs: dict[str, list[tuple[float, float]]] = {"encode-batch": [], "prepare": []}
    for _ in range(arguments.repeats):
        runs["encode-batch"].append(encode_batch_speed(directory, conversations))
        runs["prepare"].append(prepare_speed(directory))
    device = cpu_name()
    rows = []
    for column, (metric, unit, share_metric) in enumerate(
        [("tokens_s", "tokens/s", "share"), ("tokens_cpu_s", "tokens/CPU-s", "cpu_share")]
    ):
        best = {case: max(run[column] for run in of_case) for case, of_case in runs.items()}
        rows += [result_row(case, metric, value, unit, device) for case, value in best.items()]
        share = best["prepare"] / best["encode-batch"]
        rows.append(result_row("prepare", share_metric, share, "of encode-batch", device))
    return rows


def measure_memory(directory: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return result rows: tokens, seconds and peak memory of prepare over `long_rows` rows and a tenth of them."""
    train_tokenizer(directory / "tokenizer", arguments.vocab_size)
    device = cpu_name()
    rows = []
    for case, count in [("prepare-long-tenth", arguments.long_rows // 10), ("prepare-long", arguments.long_rows)]:
        write_long_rows(directory / "rows.jsonl", count, arguments.row_tokens)
        output = directory / case
        command = [sys.executable, "-m", "draftcache.tools.cli", "prepare", f"train={directory / 'rows.jsonl'}"]
        command += ["--tokenizer", str(directory / "tokenizer"), "--output", str(output)]
        command += ["--max-length", "32768", "--draft-vocab-size", "8000"]
        started = time.perf_counter()
        peak = peak_memory(command)
        seconds = time.perf_counter() - started
        split = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["splits"]["train"]
        rows += [
            result_row(case, "rows", split["rows"], "rows", device),
            result_row(case, "tokens", split["untruncated_tokens"], "tokens", device),
            result_row(case, "seconds", seconds, "s", device),
            result_row(case, "peak_memory", peak / 2**20, "MiB", device),
        ]
        shutil.rmtree(output)
    return rows


def write_long_rows(path: Path, count: int, row_tokens: int) -> None:
    """Write `count` conversations of four messages and about `row_tokens` tokens each, no two of them equal."""
    text = "".join(python_texts())
    characters = int(row_tokens * _CHARACTERS_PER_TOKEN) // 4
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            messages = []
            for turn in range(4):
                first = (number * 9973 + turn * characters) % (len(text) - characters)
                content = f"{number}\n{text[first : first + characters]}"
                messages.append({"role": ("user", "assistant")[turn % 2], "content": content})
            file.write(json.dumps({"messages": messages}) + "\n")


def peak_memory(command: list[str]) -> int:
    """Run the command; return the highest sum, in bytes, of the proportional set sizes of it and its descendants."""
    peak = 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, sum(map(_proportional_set_size, _descendants(process.pid))))
            time.sleep(0.25)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode} of: {shlex.join(command)}")
    return peak


def _descendants(pid: int) -> Iterator[int]:
    """Yield the process and everything that it started and that still runs."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # The thread may have ended since it was listed.
            for child in children.read_text().split():
                yield from _descendants(int(child))


def _proportional_set_size(pid: int) -> int:
    """Return the bytes that are the process's own plus its share of those held in common; 0 if it ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    return 0


def python_conversations(characters: int) -> Iterator[list[dict[str, str]]]:
    """Yield conversations of 2 to 8 turns and 1 to 30 thousand characters. The library's text repeats as needed."""
    text = "".join(python_texts())
    position, total, number = 0, 0, 0
    while total < characters:
        messages = []
        for turn in range(2 * (1 + number % 4)):
            length = 200 + 977 * (number * 7 + turn * 3) % 7000
            content = text[position : position + length]
            position = (position + length) % (len(text) - 8000)
            messages.append({"role": ("user", "assistant")[turn % 2], "content": content})
            total += len(content)
        number += 1
        yield messages


def python_texts() -> Iterator[str]:
    """Yield the sources of this Python's standard library, in a fixed order."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.read_text(encoding="utf-8", errors="replace")


def train_tokenizer(directory: Path, vocab_size: int) -> None:
    """Train and save a byte-level BPE with ChatML tokens and a template without generation tags."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(python_texts(), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = _TEMPLATE
    tokenizer.save_pretrained(str(directory))


def encode_batch_speed(directory: Path, conversations: list[list[dict[str, str]]]) -> tuple[float, float]:
    """Return tokens per second and per CPU second of `encode_batch` on every core, with texts rendered beforehand."""
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    backend = Tokenizer.from_file(str(directory / "tokenizer" / "tokenizer.json"))
    texts = [
        "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages)
        for messages in conversations
    ]
    tokens = 0
    clock = Clock()
    for first in range(0, len(texts), 256):
        tokens += sum(map(len, backend.encode_batch(texts[first : first + 256], add_special_tokens=False)))
    return clock.speeds(tokens)


def prepare_speed(directory: Path) -> tuple[float, float]:
    """Return tokens per second and per CPU second of the whole job, with one process per core and its CPU time."""
    from draftcache.capture.prepare.job import PrepareConfig, prepare

    config = PrepareConfig(
        tokenizer=directory / "tokenizer",
        output=directory / "prepared",
        splits={"train": [directory / "rows.jsonl"]},
        held_out={},
        draft_vocab_size=8000,
        overwrite=True,
        progress=False,
    )
    clock = Clock()
    return clock.speeds(prepare(config).manifest["splits"]["train"]["untruncated_tokens"])


class Clock:
    """Measures wall and CPU time since it was made. CPU time includes child processes that have ended."""

    def __init__(self) -> None:
        self.started = time.perf_counter(), sum(os.times()[:4])

    def speeds(self, tokens: int) -> tuple[float, float]:
        """Return tokens per second and tokens per CPU second."""
        wall, cpu = self.started
        return tokens / (time.perf_counter() - wall), tokens / (sum(os.times()[:4]) - cpu)


if __name__ == "__main__":
    main()
