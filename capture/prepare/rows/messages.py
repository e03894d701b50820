"""Messages and tools of one row, brought to the keys and roles that chat templates know.

A message's other keys (tool calls, reasoning, names, parts of content) are handed on as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from draftcache.capture.prepare.rows.rejections import RowRejectedError, clip
from draftcache.capture.prepare.rows.roles import ROLES, RoleMap

_CHANGED_KEYS = ("from", "value", "weight", "train")
"""A message with none of these keys and a role of ROLES is handed on as it is."""
_CALLS = ("function_call", "tool_call")  # speakers of ShareGPT's turns


def read_messages(values: Any, roles: RoleMap) -> tuple[list[dict[str, Any]], frozenset[int]]:
    """Messages with `role` and `content`, and the indices of assistant messages that are marked as carrying no loss.

    Each message is told by its own keys: `role` or `from`, `content` or `value`. `weight: 0` and `train: false` mark
    it. Raises RowRejectedError.
    """
    if not isinstance(values, list):
        raise RowRejectedError("bad-message", expected="a list of messages", found=clip(values))
    if not values:
        raise RowRejectedError("empty-conversation", expected="at least one message", found="[]")
    messages = [_message(number, value, roles) for number, value in enumerate(values, start=1)]
    unlearned = {index for index, value in enumerate(values) if not _learned(index + 1, value)}
    return messages, frozenset(index for index in unlearned if messages[index]["role"] == "assistant")


def _message(number: int, message: Any, roles: RoleMap) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RowRejectedError("bad-message", expected="an object with `role` and `content`", found=clip(message))
    speaker = message.get("role") if message.get("role") is not None else message.get("from")
    if not isinstance(speaker, str):
        raise RowRejectedError(
            "bad-message",
            expected="an object with a text `role` (or `from`)",
            found=f"message {number}: {clip(message)}",
        )
    role = roles.role(speaker)
    if role is None and speaker.strip().lower() in _CALLS and isinstance(message.get("value"), str):
        # A turn of its own, whose text is the call, or a list of calls, as JSON.
        return {"role": "assistant", "content": "", "tool_calls": message["value"]}
    if role is None:
        raise RowRejectedError(
            "unknown-role",
            expected=f"a name of {', '.join(ROLES)}; give this one a role with `--role {clip(speaker + '=ROLE')!r}`",
            found=f"role {clip(speaker)!r} in message {number}",
        )
    if role == message.get("role") and not any(key in message for key in _CHANGED_KEYS):
        return message
    read = {key: value for key, value in message.items() if key not in (*_CHANGED_KEYS, "role", "content")}
    read["role"] = role
    content, value = message.get("content"), message.get("value")
    if value is not None and (content is None or message.get("role") is None):
        content = value if isinstance(value, str) else None
    if content is not None or (value is None and "content" in message):
        read["content"] = content
    elif value is not None or message.get("role") is None:
        raise RowRejectedError(
            "bad-message",
            expected='{"role": ..., "content": ...} or {"from": ..., "value": text}',
            found=f"message {number}: {clip(message)}",
        )
    return read


def _learned(number: int, message: Mapping[str, Any]) -> bool:
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and not (isinstance(weight, int | float) and weight in (0, 1)):
        raise RowRejectedError(
            "bad-weight", expected="`weight` 0 (no loss) or 1", found=f"{clip(weight)} in message {number}"
        )
    if train is not None and not isinstance(train, bool):
        raise RowRejectedError(
            "bad-train", expected="`train` false (no loss) or true", found=f"{clip(train)} in message {number}"
        )
    return weight != 0 and train is not False


def read_tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The JSON schemas of `tools`, or of the older `functions`, each as `{"type": "function", "function": {...}}`.

    The list, and each tool in it, may be JSON text. None where the row has none. Raises RowRejectedError.
    """
    name = "functions" if row.get("tools") is None else "tools"
    tools = _from_text(row.get(name))
    if tools is None:
        return None
    tools = [_from_text(tool) for tool in tools] if isinstance(tools, list) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowRejectedError("bad-tools", expected=f"{name}: a list of JSON schemas", found=clip(row[name]))
    return [_wrapped(tool) for tool in tools]


def _from_text(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as exc:
        raise RowRejectedError("bad-tools", expected="tools as JSON", found=f"{exc}: {clip(value)}") from exc


def _wrapped(tool: dict[str, Any]) -> dict[str, Any]:
    """The tool as serving engines take it, which refuse a bare `{"name": ..., "parameters": ...}`."""
    if "function" in tool or not isinstance(tool.get("name"), str):
        return tool
    return {
        "type": "function",
        "function": {key: value for key, value in tool.items() if key != "type" or value != "function"},
    }


def without_filled_keys(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a table as JSON would have it.

    A table gives every struct all keys of its column, filled with None: these are dropped, all but a message's
    `content`, whose None is a message without text. Arrays and scalars of numpy become Python's.
    """
    return {key: [_plain(item, keep=("content",)) for item in _list(value)] if _is_list(value) else _plain(value)
            for key, value in row.items()}  # fmt: skip


def _plain(value: Any, keep: tuple[str, ...] = ()) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if item is not None or key in keep}
    if _is_list(value):
        return [_plain(item) for item in _list(value)]
    return value.item() if isinstance(value, np.generic) else value


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple | np.ndarray)


def _list(value: Any) -> list[Any]:
    return value.tolist() if isinstance(value, np.ndarray) else list(value)
