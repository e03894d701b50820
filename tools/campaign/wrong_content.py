"""What may lie where a file, a directory or a row is expected, and is none."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path


def _deep(path: Path) -> None:
    path.write_text("[" * 200_000, encoding="utf-8")


def make_directory(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("notes", encoding="utf-8")


def _loop(path: Path) -> None:
    path.symlink_to(path)


WRONG_FILES: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "an empty file": lambda path: path.touch(),
    "an empty directory": lambda path: path.mkdir(),
    "a directory of something else": make_directory,
    "a pipe": lambda path: os.mkfifo(path),
    "a link to itself": _loop,
    "random bytes": lambda path: path.write_bytes(random.Random(0).randbytes(5000)),
    "an infinite number": lambda path: path.write_text('{"format": Infinity, "version": NaN}'),
    "half a character": lambda path: path.write_text('{"format": "\\ud800"}'),
    "deep brackets": _deep,
}
"""What may lie where a file or directory is expected, and how it is made."""


WRONG_ROWS = (
    "", "{", "null", "3", '"text"', "[]", "{}", '{"messages": null}', '{"messages": []}', '{"messages": {}}',
    '{"messages": [null]}', '{"messages": [3]}', '{"messages": [[]]}', '{"messages": [{"role": "user"}]}',
    '{"messages": [{"content": "hi"}]}', '{"messages": [{"role": 3, "content": "hi"}]}',
    '{"messages": [{"role": "user", "content": 7}]}', '{"messages": [{"role": "nobody", "content": "hi"}]}',
    '{"messages": [{"role": "user", "content": "hi"}]}', '{"token_ids": [1, 2], "loss_mask": [1]}',
    '{"token_ids": [1, -2], "loss_mask": [0, 1]}', '{"token_ids": [1, 99999999], "loss_mask": [0, 1]}',
    '{"token_ids": [1, 2.5], "loss_mask": [0, 1]}', '{"token_ids": "12", "loss_mask": [0, 1]}',
    '{"token_ids": [1, 2], "loss_mask": [0, 2]}', '{"token_ids": [], "loss_mask": []}',
    '{"token_ids": [1, NaN], "loss_mask": [0, 1]}', '{"token_ids": [1, 1e999], "loss_mask": [0, 1]}',
    '{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "\\udfff"}]}',
    '{"messages": ' + "[" * 100_000, '{"a": ' * 5_000 + "1" + "}" * 5_000, "\x00", "\ufeff{}",
    '{"messages": [{"role": "assistant", "content": [7]}]}',
    '{"token_ids": [1, ' + "9" * 5_000 + '], "loss_mask": [0, 1]}',
)  # fmt: skip
"""Lines of JSONL that are no conversations."""
