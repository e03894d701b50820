from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from draftcache.capture.prepare.rows.conversations import (
    ChatRow,
    Rejection,
    RowRejectedError,
    TokenRow,
    parse_row,
    read_conversations,
)
from draftcache.store.common.errors import InputError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello 🎉"}]


def encode(row: Any) -> bytes:
    return json.dumps(row).encode()


def rows_of(path: Path) -> tuple[list[int], list[Rejection]]:
    items = list(read_conversations(path))
    return (
        [item[0] for item in items if not isinstance(item, Rejection)],
        [item for item in items if isinstance(item, Rejection)],
    )


def test_openai_messages_reach_the_template_untouched() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "Ann"},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call], "extra": 7},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = parse_row(encode({"messages": messages, "tools": tools, "id": 3}))
    assert row == ChatRow(messages=messages, tools=tools)


@pytest.mark.parametrize(
    ("speaker", "role"),
    [("human", "user"), ("gpt", "assistant"), ("model", "assistant"), ("observation", "tool"), ("Human", "user")],
)
def test_sharegpt_speakers(speaker: str, role: str) -> None:
    row = parse_row(encode({"conversations": [{"from": speaker, "value": "x", "weight": 1}]}))
    assert isinstance(row, ChatRow)
    assert row.messages == [{"weight": 1, "role": role, "content": "x"}]


def test_sharegpt_system_and_tools_beside_the_turns() -> None:
    row = parse_row(
        encode({"conversations": [{"from": "human", "value": "x"}], "system": "be brief", "tools": '[{"name": "f"}]'})
    )
    assert isinstance(row, ChatRow)
    assert [message["role"] for message in row.messages] == ["system", "user"]
    assert row.tools == [{"name": "f"}]


def test_token_ids_win_over_messages() -> None:
    row = parse_row(encode({"messages": MESSAGES, "token_ids": [5, 131071, 7], "loss_mask": [0, 1, 1]}))
    assert isinstance(row, TokenRow)
    assert row.token_ids.dtype == np.uint32
    assert row.token_ids.tolist() == [5, 131071, 7]
    assert row.loss_mask.dtype == np.bool_
    assert row.loss_mask.tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("line", "reason", "found"),
    [
        (b'{"messages": [', "malformed-json", '{"messages": ['),
        (b"[" * 100_000, "malformed-json", "recursion"),
        (b'{"messages": "\xff"}', "invalid-utf8", "byte 0xff at offset 14"),
        (b"[1, 2]", "unknown-form", "[1, 2]"),
        (encode({"text": "x"}), "unknown-form", "text"),
        (encode({"messages": []}), "empty-conversation", "[]"),
        (encode({"conversations": []}), "empty-conversation", "[]"),
        (encode({"token_ids": [], "loss_mask": []}), "empty-conversation", "[]"),
        (encode({"messages": "hi"}), "bad-message", "hi"),
        (encode({"messages": [{"content": "no role"}]}), "bad-message", "no role"),
        (encode({"messages": [{"role": 3, "content": "x"}]}), "bad-message", "3"),
        (encode({"conversations": [{"from": "martian", "value": "x"}]}), "bad-message", "martian"),
        (encode({"conversations": [{"from": "gpt", "value": 4}]}), "bad-message", "4"),
        (encode({"messages": MESSAGES, "tools": "{"}), "bad-tools", "{"),
        (encode({"messages": MESSAGES, "tools": ["f"]}), "bad-tools", "f"),
        (encode({"token_ids": [1, 2], "loss_mask": [1]}), "length-mismatch", "1 mask values"),
        (encode({"token_ids": [1, 2]}), "bad-loss-mask", "None"),
        (encode({"token_ids": "1 2", "loss_mask": [1]}), "bad-token-ids", "1 2"),
        (encode({"token_ids": [1, -2], "loss_mask": [1, 1]}), "bad-token-ids", "-2"),
        (encode({"token_ids": [1, 2**70], "loss_mask": [1, 1]}), "bad-token-ids", ""),
        (encode({"token_ids": [1, 2**40], "loss_mask": [1, 1]}), "bad-token-ids", str(2**40)),
        (encode({"token_ids": [1.5, 2], "loss_mask": [1, 1]}), "bad-token-ids", "1.5"),
        (encode({"token_ids": [True, False], "loss_mask": [1, 1]}), "bad-token-ids", "True"),
        (encode({"token_ids": [[1], [2, 3]], "loss_mask": [1, 1]}), "bad-token-ids", ""),
        (encode({"token_ids": [1, 2], "loss_mask": [0, 2]}), "bad-loss-mask", "2"),
    ],
)
def test_bad_rows_say_what_was_expected_and_found(line: bytes, reason: str, found: str) -> None:
    with pytest.raises(RowRejectedError) as caught:
        parse_row(line)
    assert caught.value.reason == reason
    assert caught.value.expected
    assert found in caught.value.found
    assert len(caught.value.found) < 400


def test_blank_lines_count_but_yield_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + encode({"messages": MESSAGES}) + b"\r\n\n  \n" + encode({"messages": MESSAGES}))
    assert rows_of(path) == ([1, 4], [])


def test_unicode_line_separators_do_not_split_a_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    text = json.dumps({"messages": [{"role": "user", "content": "a\u2028b\x85c"}]}, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    assert rows_of(path) == ([1], [])


def compress(kind: str, data: bytes) -> bytes:
    return gzip.compress(data) if kind == "gz" else zstandard.ZstdCompressor().compress(data)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_files_of_several_frames(tmp_path: Path, kind: str) -> None:
    line = encode({"messages": MESSAGES}) + b"\n"
    path = tmp_path / f"rows.jsonl.{kind}"
    # The second frame starts in the middle of a line.
    path.write_bytes(compress(kind, line + line[:20]) + compress(kind, line[20:] + line))
    assert rows_of(path) == ([1, 2, 3], [])


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_cut_compressed_file_gives_its_rows_then_a_rejection(tmp_path: Path, kind: str) -> None:
    lines = [
        encode({"messages": [{"role": "user", "content": np.random.default_rng(i).bytes(3000).hex()}]}) + b"\n"
        for i in range(400)
    ]
    data = compress(kind, b"".join(lines))
    path = tmp_path / f"rows.jsonl.{kind}"
    path.write_bytes(data[: len(data) // 2])
    numbers, (rejection,) = rows_of(path)
    assert 50 < len(numbers) < 350
    assert numbers == list(range(1, len(numbers) + 1))
    assert (rejection.file, rejection.line, rejection.reason) == (str(path), len(numbers) + 1, "damaged-file")
    assert "complete" in rejection.expected
    assert "ends inside" in rejection.found


def test_zstd_files_with_a_long_window(tmp_path: Path) -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28)  # `zstd --long=28`; 27 is the usual limit
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    line = encode({"messages": MESSAGES}) + b"\n"
    path = tmp_path / "rows.jsonl.zst"
    path.write_bytes(compressor.compress(line) + compressor.flush())
    assert rows_of(path) == ([1], [])


def test_a_damaged_byte_in_gzip_is_a_rejection(tmp_path: Path) -> None:
    data = bytearray(gzip.compress(encode({"messages": MESSAGES}) + b"\n"))
    data[-6] ^= 0xFF  # inside the checksum
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(data)
    _, rejections = rows_of(path)
    assert [rejection.reason for rejection in rejections] == ["damaged-file"]


def test_rejections_name_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(encode({"messages": MESSAGES}) + b"\nnot json\n" + encode({"messages": MESSAGES}) + b"\n")
    numbers, (rejection,) = rows_of(path)
    assert numbers == [1, 3]
    assert str(rejection).startswith(f"{path}:2: malformed-json: expected one JSON object; found ")
    assert rejection.as_json()["line"] == 2


def test_missing_file_and_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            list(read_conversations(path))
