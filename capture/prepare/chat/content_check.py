"""Whether the text of every message is in the rendered text: what a template drops is dropped from training too."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from draftcache.capture.prepare.chat.rendering import Message, Tools

_NO_TEXT = {
    "created", "finish_reason", "id", "index", "language", "model", "name", "role", "timestamp", "tool_call_id", "type",
    "uuid",
}  # fmt: skip
"""Keys of a message that hold no text of the conversation."""
_THINK = re.compile(r"</?think(?:ing)?>")
_BLANK = re.compile(r"\s+")


def vanished(message: Message, text: str) -> list[str]:
    """Return the keys of a message of which a part does not occur in `text`, blanks aside."""
    squeezed = ""
    keys = []
    for key, pieces in _pieces(message).items():
        for piece in pieces:
            if piece in text:
                continue
            squeezed = squeezed or _BLANK.sub("", text)
            if not _occurs_squeezed(piece, squeezed):
                keys.append(key)
                break
    return keys


def vanished_tools(tools: Tools, text: str) -> list[str]:
    """Return the names of the tools that do not occur in `text`."""
    names = [str(tool.get("function", tool).get("name", "")) for tool in tools or []]
    return [name for name in names if name not in text]


def _occurs_squeezed(piece: str, squeezed: str) -> bool:
    """Whether a piece occurs in a text without blanks, plain or as a JSON string writes it."""
    forms = (piece, json.dumps(piece, ensure_ascii=False)[1:-1], json.dumps(piece)[1:-1])
    return any(_BLANK.sub("", form) in squeezed for form in forms)


def _pieces(message: Message) -> dict[str, list[str]]:
    """The pieces of text of each key. Templates cut a content at its thinking tags, and write those anew."""
    found = {}
    for key, value in message.items():
        if key in _NO_TEXT:
            continue
        texts = _THINK.split(value) if isinstance(value, str) else list(_leaves(value))
        pieces = [stripped for text in texts if (stripped := text.strip())]
        if pieces:
            found[key] = pieces
    return found


def _leaves(value: Any) -> Iterator[str]:
    """The texts and names of keys inside of a value; the ids and types of tool calls are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key in ("id", "type", "index"):
                continue
            if key not in ("function", "name", "arguments"):
                yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
