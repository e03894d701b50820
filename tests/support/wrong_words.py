"""Every command with paths that hold nothing it could use."""

from __future__ import annotations

from pathlib import Path


def words_naming(text: Path, out: Path) -> dict[str, list[object]]:
    """Return the words behind each command's name: every path to read is `text`, every one to write is `out`."""
    return {
        "prepare": ["--tokenizer", text, "--output", out, f"train={text}"],
        "generate": ["--verifier", text, "--output", out, f"train={text}"],
        "vocab": ["--size", "10", "--output", out, text],
        "capture": ["--verifier", text, "--dataset", text, "--output", out, "--layers", "0,1"],
        "import": [
            text, "--from", "specforge", "--verifier", text, "--output", out, "--layers", "0,1",
            "--draft-vocab-size", "9",
        ],
        "train": ["--store", text, "--splits", "a", "--output", out],
        "sweep": [text, "--output", out],
        "eval": ["--store", text, "--checkpoint", text, "--splits", "a"],
        "report": [text, "-o", out],
        "export": ["--checkpoint", text, "--output", out, "--engine", "vllm"],
        "size": ["--dataset", text, "--verifier", text],
        "inspect": [text],
        "probe": ["--compare", text, text],
        "verify": [text],
        "convert": [text, out],
        "repair": [text],
        "run": [text],
        "demo": ["--output", text],
    }  # fmt: skip
