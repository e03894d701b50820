"""The forms of rows, told apart by their keys.

- pre-tokenised: `token_ids` or `input_ids`, with a `loss_mask` (or, beside `input_ids`, `labels`), for the verifier's
  own traces, whose ids must not be tokenised again. Other keys (such as `messages`, for readers) are ignored.
- chats: `messages`, `conversations` or `conversation`, a list of `{"role": ..., "content": ...}` (OpenAI's) or
  `{"from": ..., "value": ...}` (ShareGPT's).
- a prompt and its answer: `prompt` with `completion` or `response`, each text or a list of messages.
- an instruction (Alpaca's): `instruction` and `output`, with `input`, and `history` as [[question, answer], ...].

Beside the last three, `system` (or `system_prompt`) is the first message's text, and `tools` (or `functions`) are JSON
schemas. A row of any other form is rejected.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from draftcache.capture.prepare.rows.messages import read_messages, read_tools, without_filled_keys
from draftcache.capture.prepare.rows.rejections import RowRejectedError, clip
from draftcache.capture.prepare.rows.roles import RoleMap
from draftcache.capture.prepare.rows.token_rows import TokenRow, parse_token_row

BUILT_IN_ROLES = RoleMap()

FORM_KEYS = (
    *("token_ids", "input_ids", "messages", "conversations", "conversation", "prompt", "instruction", "chosen"),
)
"""The keys by which a form is told."""

ROW_KEYS = frozenset(
    (
        *FORM_KEYS,
        *("loss_mask", "labels", "attention_mask", "completion", "response", "rejected", "input", "output", "history"),
        *("system", "system_prompt", "tools", "functions"),
    )
)
"""All keys of a row that are read."""

_Messages: TypeAlias = tuple[list[dict[str, Any]], frozenset[int]]


@dataclass(frozen=True, kw_only=True)
class ChatRow:
    """Messages for the chat template, each a dict with a `role`, and the tools' JSON schemas, or None.

    `unlearned` holds the indices of assistant messages that carry no loss.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    unlearned: frozenset[int] = frozenset()


def parse_row(
    row: bytes | Mapping[str, Any], roles: RoleMap = BUILT_IN_ROLES, *, answered: bool = True
) -> ChatRow | TokenRow:
    """Parse one JSON object, as UTF-8 text or as the values of a table's row. Raises RowRejectedError.

    Unless rows must be `answered`, a `prompt` or an `instruction` may stand alone.
    """
    values = _json_object(row) if isinstance(row, bytes) else row
    if values.get("token_ids") is not None or values.get("input_ids") is not None:
        return parse_token_row(values)
    if not isinstance(row, bytes):
        values = without_filled_keys(values)
    messages, unlearned = (None if answered else _question(values, roles)) or _messages(values, roles)
    system = _system(values)
    if system and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": system}, *messages]
        unlearned = frozenset(index + 1 for index in unlearned)
    return ChatRow(messages=messages, tools=read_tools(values), unlearned=unlearned)


def _json_object(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as exc:
        raise RowRejectedError(
            "invalid-utf8", expected="UTF-8 text", found=f"byte 0x{line[exc.start]:02x} at offset {exc.start}"
        ) from exc
    except (ValueError, RecursionError) as exc:  # also integers of more digits than Python converts
        raise RowRejectedError(
            "malformed-json", expected="one JSON object", found=f"{exc}: {clip(line.decode('utf-8', 'replace'))}"
        ) from exc
    if not isinstance(row, dict):
        raise RowRejectedError("unknown-form", expected="a JSON object", found=clip(row))
    return row


def _messages(row: Mapping[str, Any], roles: RoleMap) -> _Messages:
    for key in ("messages", "conversations", "conversation"):
        if row.get(key) is not None:
            return read_messages(row[key], roles)
    if row.get("prompt") is not None:
        for key in ("completion", "response"):
            if row.get(key) is not None:
                return _prompt_and_answer(row["prompt"], row[key], roles)
    if row.get("instruction") is not None and row.get("output") is not None:
        return read_messages(_instruction(row), roles)
    if row.get("chosen") is not None or row.get("rejected") is not None:
        raise RowRejectedError(
            "unknown-form",
            expected="one answer: for a preference pair, give `completion` in the place of `chosen` and `rejected`",
            found=f"keys {clip(sorted(map(str, row)))}",
        )
    raise RowRejectedError(
        "unknown-form",
        expected="a key `messages`, `conversations`, `token_ids` or `input_ids`, or `prompt` with `completion` or "
        "`response`, or `instruction` with `output`",
        found=f"keys {clip(sorted(map(str, row)))}",
    )


def _question(row: Mapping[str, Any], roles: RoleMap) -> _Messages | None:
    """The messages of a prompt or an instruction that has no answer; None for any other row."""
    if any(row.get(key) is not None for key in ("messages", "conversations", "conversation")):
        return None
    if row.get("prompt") is not None and row.get("completion") is None and row.get("response") is None:
        return read_messages(_as_messages(row["prompt"], "user"), roles)
    if row.get("instruction") is not None and row.get("output") is None:
        messages, unlearned = read_messages(_instruction(row), roles)
        return messages[:-1], unlearned
    return None


def _prompt_and_answer(prompt: Any, answer: Any, roles: RoleMap) -> _Messages:
    """Messages of both. Assistant messages of the prompt are given, not answered: they carry no loss."""
    asked, _ = read_messages(_as_messages(prompt, "user"), roles)
    answered, unlearned = read_messages(_as_messages(answer, "assistant"), roles)
    given = (index for index, message in enumerate(asked) if message["role"] == "assistant")
    return asked + answered, frozenset((*given, *(len(asked) + index for index in unlearned)))


def _as_messages(value: Any, role: str) -> Any:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _instruction(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    texts = {key: _text(row, key, "bad-message") for key in ("instruction", "input", "output")}
    history = row.get("history") or []
    pairs_expected = "history: a list of [question, answer]"
    if not isinstance(history, list):
        raise RowRejectedError("bad-message", expected=pairs_expected, found=clip(history))
    turns: list[dict[str, Any]] = []
    for pair in history:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise RowRejectedError("bad-message", expected=pairs_expected, found=clip(pair))
        turns += _turn(*pair)
    asked = "\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    return [*turns, *_turn(asked, texts["output"])]


def _turn(asked: str, answered: str) -> Iterable[dict[str, Any]]:
    return {"role": "user", "content": asked}, {"role": "assistant", "content": answered}


def _system(row: Mapping[str, Any]) -> str:
    """The system text beside the messages; blank where there is none."""
    texts = (_text(row, key, "bad-system") for key in ("system", "system_prompt"))
    return next((text for text in texts if text.strip()), "")


def _text(row: Mapping[str, Any], key: str, reason: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowRejectedError(reason, expected=f"`{key}` as text", found=clip(value))
    return value
