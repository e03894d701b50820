"""Read conversations from JSONL, plain or compressed with gzip or zstd, one row at a time.

A row has one of three forms, told apart by its keys:

- pre-tokenised: `{"token_ids": [...], "loss_mask": [...]}`, for the verifier's own traces, whose ids must not be
  tokenised again. Other keys (such as `messages`, for readers) are ignored.
- OpenAI: `{"messages": [{"role": ..., "content": ..., ...}], "tools": [...]?}`. The chat template gets the messages
  unchanged, with all their keys (reasoning, tool calls, names).
- ShareGPT: `{"conversations": [{"from": ..., "value": ...}], "system": ...?, "tools": ...?}`.

Any other row becomes a `Rejection`, which names file, line, what was expected and what was found. A damaged compressed
file yields its readable rows and then one rejection for the rest.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import zstandard

from draftcache.store.common.errors import InputError

_BLOCK = 1 << 18
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_FOUND_CHARACTERS = 160

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
    "ipython": "tool",
}


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """Why one row was set aside. `line` counts from 1; 0 stands for the file as a whole."""

    file: str
    line: int
    reason: str  # a short word by which rejections are counted, such as `malformed-json`
    expected: str
    found: str

    def as_json(self) -> dict[str, Any]:
        """The record of this row in `quarantine.jsonl`."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}: expected {self.expected}; found {self.found}"


class RowRejectedError(InputError):
    """Raised for a row that cannot be used; `at(file, line)` makes the Rejection that is recorded."""

    def __init__(self, reason: str, *, expected: str, found: str) -> None:
        super().__init__(f"{reason}: expected {expected}; found {found}")
        self.reason, self.expected, self.found = reason, expected, found

    def at(self, file: str, line: int) -> Rejection:
        """The rejection of the row in this line of this file."""
        return Rejection(file=file, line=line, reason=self.reason, expected=self.expected, found=self.found)


@dataclass(frozen=True, kw_only=True)
class ChatRow:
    """Messages for the chat template, each a dict with a `role`, and the tools' JSON schemas, or None."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    unlearned: frozenset[int] = frozenset()
    """Indices of the assistant messages that carry no loss."""


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """A pre-tokenised row: `token_ids` uint32 [T], `loss_mask` bool [T], T > 0."""

    token_ids: np.ndarray
    loss_mask: np.ndarray


def read_conversations(path: Path) -> Iterator[tuple[int, ChatRow | TokenRow] | Rejection]:
    """Yield (line number from 1, row), or the rejection of that line. Blank lines are skipped."""
    for item in read_lines(path):
        if isinstance(item, Rejection):
            yield item
            continue
        number, line = item
        try:
            yield number, parse_row(line)
        except RowRejectedError as exc:
            yield exc.at(str(path), number)


def read_lines(path: Path) -> Iterator[tuple[int, bytes] | Rejection]:
    """Yield (line number from 1, bytes without the newline) of each line that is not blank.

    The file's first bytes decide how it is compressed, not its name. Where a compressed stream is cut off or damaged,
    its complete lines come first, then a `Rejection` for the line at which reading stopped. Raises InputError where
    there is no file.
    """
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(_split_lines(_blocks(file)), start=1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, line
    except (zlib.error, zstandard.ZstdError, EOFError) as exc:
        yield Rejection(
            file=str(path),
            line=number + 1,
            reason="damaged-file",
            expected="a complete compressed stream (every row from this line on is missing)",
            found=str(exc),
        )
    except FileNotFoundError as exc:
        raise InputError(f"{path}: expected a JSONL file, found nothing there") from exc
    except IsADirectoryError as exc:
        raise InputError(f"{path}: expected a JSONL file, found a directory") from exc


def parse_row(line: bytes) -> ChatRow | TokenRow:
    """Parse one line of JSON. Raises RowRejectedError."""
    try:
        row = json.loads(line)
    except UnicodeDecodeError as exc:
        raise RowRejectedError(
            "invalid-utf8", expected="UTF-8 text", found=f"byte 0x{line[exc.start]:02x} at offset {exc.start}"
        ) from exc
    except (ValueError, RecursionError) as exc:  # also integers of more digits than Python converts
        raise RowRejectedError(
            "malformed-json", expected="one JSON object", found=f"{exc}: {clip(line.decode('utf-8'))}"
        ) from exc
    if not isinstance(row, dict):
        raise RowRejectedError("unknown-form", expected="a JSON object", found=clip(row))
    if "token_ids" in row:
        return _token_row(row)
    if "messages" in row:
        return ChatRow(messages=_checked_messages(row["messages"], "role"), tools=_tools(row))
    if "conversations" in row:
        return _sharegpt_row(row)
    raise RowRejectedError(
        "unknown-form",
        expected="a key `messages`, `conversations` or `token_ids`",
        found=f"keys {clip(sorted(row))}",
    )


def clip(value: Any) -> str:
    """`repr(value)`, or the text itself, cut to 160 characters."""
    try:
        text = value if isinstance(value, str) else repr(value)
    except (ValueError, RecursionError):  # an integer of too many digits, or nesting that is too deep to show
        text = f"a {type(value).__name__} that can't be shown"
    return text if len(text) <= _FOUND_CHARACTERS else text[:_FOUND_CHARACTERS] + "..."


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    magic = file.read(4)
    file.seek(0)
    if magic.startswith(_GZIP_MAGIC):
        return _decompressed(file, lambda: zlib.decompressobj(wbits=31))
    if magic == _ZSTD_MAGIC:
        # Files written with `zstd --long=31` are legitimate, but the default limit of the window refuses them.
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        return _decompressed(file, decompressor.decompressobj)
    return iter(lambda: file.read(_BLOCK), b"")


def _decompressed(file: BinaryIO, new_decoder: Callable[[], Any]) -> Iterator[bytes]:
    """Decompress concatenated frames. Raises EOFError for a cut file, which zstandard's stream reader passes over."""
    decoder = None
    while block := file.read(_BLOCK):
        while block:
            decoder = decoder or new_decoder()
            yield decoder.decompress(block)
            block = decoder.unused_data if decoder.eof else b""
            decoder = None if decoder.eof else decoder
    if decoder is not None:
        raise EOFError("the file ends inside a compressed stream")


def _split_lines(blocks: Iterator[bytes]) -> Iterator[bytes]:
    pending: list[bytes] = []  # pieces of one line, joined once, so that a long line takes linear time
    for block in blocks:
        first, *others = block.split(b"\n")
        pending.append(first)
        for other in others:
            yield b"".join(pending)
            pending = [other]
    if any(pending):
        yield b"".join(pending)


def _token_row(row: dict[str, Any]) -> TokenRow:
    token_ids = _integers(row["token_ids"], "token_ids", "iu", "integers >= 0")
    loss_mask = _integers(row.get("loss_mask"), "loss_mask", "iub", "0, 1, false or true")
    if len(token_ids) == 0:
        raise RowRejectedError("empty-conversation", expected="at least one token id", found="token_ids: []")
    if len(token_ids) != len(loss_mask):
        raise RowRejectedError(
            "length-mismatch",
            expected=f"a loss_mask as long as token_ids ({len(token_ids)})",
            found=f"{len(loss_mask)} mask values",
        )
    if token_ids.min() < 0 or token_ids.max() > np.iinfo(np.uint32).max:
        wrong = token_ids.min() if token_ids.min() < 0 else token_ids.max()
        raise RowRejectedError("bad-token-ids", expected="token_ids: integers >= 0", found=str(wrong))
    if loss_mask.dtype != np.bool_ and not np.isin(loss_mask, (0, 1)).all():
        wrong = loss_mask[~np.isin(loss_mask, (0, 1))][0]
        raise RowRejectedError("bad-loss-mask", expected="loss_mask: 0, 1, false or true", found=str(wrong))
    return TokenRow(token_ids=token_ids.astype(np.uint32), loss_mask=loss_mask.astype(np.bool_))


def _integers(values: Any, name: str, kinds: str, expected: str) -> np.ndarray:
    """A flat array of one of the dtype `kinds`; a float or string among the values makes numpy choose another kind."""
    reason = f"bad-{name.replace('_', '-')}"
    if not isinstance(values, list):
        raise RowRejectedError(reason, expected=f"{name}: a list of {expected}", found=clip(values))
    try:
        array = np.asarray(values) if values else np.zeros(0, np.int64)
    except (ValueError, OverflowError) as exc:
        raise RowRejectedError(reason, expected=f"{name}: a flat list of {expected}", found=str(exc)) from exc
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise RowRejectedError(reason, expected=f"{name}: a flat list of {expected}", found=clip(values))
    return array


def _sharegpt_row(row: dict[str, Any]) -> ChatRow:
    messages = []
    for turn in _checked_messages(row["conversations"], "from"):
        role = _SHAREGPT_ROLES.get(turn["from"].lower())
        if role is None or not isinstance(turn.get("value"), str):
            raise RowRejectedError(
                "bad-message",
                expected=f'{{"from": one of {", ".join(_SHAREGPT_ROLES)}; "value": text}}',
                found=clip(turn),
            )
        extra = {key: value for key, value in turn.items() if key not in ("from", "value")}
        messages.append({**extra, "role": role, "content": turn["value"]})
    system = row.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return ChatRow(messages=messages, tools=_tools(row))


def _checked_messages(messages: Any, role_key: str) -> list[dict[str, Any]]:
    if not isinstance(messages, list):
        raise RowRejectedError("bad-message", expected="a list of messages", found=clip(messages))
    if not messages:
        raise RowRejectedError("empty-conversation", expected="at least one message", found="[]")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get(role_key), str):
            raise RowRejectedError("bad-message", expected=f"an object with a text `{role_key}`", found=clip(message))
    return messages


def _tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = row.get("tools")
    if isinstance(tools, str):  # ShareGPT collections store tools as JSON text
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as exc:
            raise RowRejectedError("bad-tools", expected="tools as JSON", found=f"{exc}: {clip(tools)}") from exc
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowRejectedError("bad-tools", expected="a list of JSON schemas", found=clip(tools))
    return tools
