"""Messages as a chat template wants them: the same steps that serving engines take before they render a request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from draftcache.capture.prepare.chat.rendering import Message
from draftcache.capture.prepare.chat.traits import REASONING_NAMES, TemplateTraits
from draftcache.capture.prepare.rows.forms import ChatRow
from draftcache.capture.prepare.rows.rejections import RowRejectedError, clip

_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING_PARTS = ("thinking", "reasoning")


def normalise(row: ChatRow, traits: TemplateTraits, system: str | None = None) -> ChatRow:
    """Return the row as the template wants it.

    Contents become texts: text parts are joined by newlines, and null is the empty text. Arguments of tool calls become
    objects or JSON texts, and a legacy `function_call` becomes a tool call. Reasoning gets the key that the template
    reads. A developer message becomes a system message where the template knows no developer. `system` is put before a
    row that has no system or developer message. Other keys that are null are dropped. Raises RowRejectedError, with the
    message's number and role, for content that text can't hold and for tool calls that are none.
    """
    messages, unlearned = row.messages, row.unlearned
    if system is not None and messages[0].get("role") not in ("system", "developer"):
        messages = [{"role": "system", "content": system}, *messages]
        unlearned = frozenset(number + 1 for number in unlearned)
    normalised = [_message(message, number, traits) for number, message in enumerate(messages, start=1)]
    return replace(row, messages=normalised, unlearned=unlearned)


def _message(message: Message, number: int, traits: TemplateTraits) -> Message:
    where = f"message {number} ({message.get('role')})"
    found = {key: value for key, value in message.items() if value is not None}
    role = found.get("role")
    if role == "developer" and not traits.developer:
        found["role"] = "system"
    if role == "function":
        found["role"] = "tool"
    text, thought = _content(found.get("content"), where)
    found["content"] = text
    if role == "assistant":
        _set_reasoning(found, thought, traits)
        _set_tool_calls(found, where, traits)
    elif thought:
        raise _rejected("content-kind", where, "text parts", "a reasoning part in a message that no assistant wrote")
    return found


def _content(content: Any, where: str) -> tuple[str, str]:
    """The text and the reasoning of a message's content."""
    if content is None or isinstance(content, str):
        return content or "", ""
    if not isinstance(content, list):
        raise _rejected("content-kind", where, "content that is text, parts or null", clip(content))
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part
        if isinstance(part, dict):
            names = ("text", *_REASONING_PARTS) if kind in _REASONING_PARTS else ("text",)
            text = next((part[name] for name in names if isinstance(part.get(name), str)), None)
        if kind not in (*_TEXT_PARTS, *_REASONING_PARTS) or not isinstance(text, str):
            raise _rejected("content-kind", where, "text parts", f"a part of the kind {kind!r}: {clip(part)}")
        (thoughts if kind in _REASONING_PARTS else texts).append(text)
    return "\n".join(texts), "\n".join(thoughts)


def _set_reasoning(message: Message, thought: str, traits: TemplateTraits) -> None:
    """Put the reasoning under the template's key. Under any other key it stays, for the content check to count it."""
    named = {name: message.pop(name) for name in REASONING_NAMES if name in message}
    if thought:
        named["thinking"] = thought
    texts = {name: text for name, text in named.items() if isinstance(text, str) and text}
    if not texts:
        return
    name, text = next(iter(texts.items()))
    message[traits.reasoning or name] = text


def _set_tool_calls(message: Message, where: str, traits: TemplateTraits) -> None:
    calls = message.pop("tool_calls", None)
    legacy = message.pop("function_call", None)
    if isinstance(calls, str):
        calls = _parsed(calls, where, "tool_calls")
    if not calls and legacy is not None:
        calls = [legacy]
    if not calls:
        return
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list):
        raise _rejected("tool-call", where, "a list of tool calls", clip(calls))
    message["tool_calls"] = [_tool_call(call, where, traits) for call in calls]


def _tool_call(call: Any, where: str, traits: TemplateTraits) -> dict[str, Any]:
    wrapped = isinstance(call, Mapping) and isinstance(call.get("function"), Mapping)
    function = dict(call["function"]) if wrapped else dict(call) if isinstance(call, Mapping) else {}
    if not isinstance(function.get("name"), str):
        raise _rejected("tool-call", where, "a tool call with a function's name and arguments", clip(call))
    arguments = function.get("arguments")
    if arguments is None or arguments == "":
        arguments = {}
    if isinstance(arguments, str) and traits.arguments != "text":
        arguments = _parsed(arguments, where, "the arguments of a tool call")
    if traits.arguments == "text" and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    function["arguments"] = arguments
    outer = {key: value for key, value in call.items() if key != "function" and value is not None} if wrapped else {}
    return {**outer, "type": "function", "function": function}


def _parsed(text: str, where: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise _rejected("tool-call", where, f"{what} as JSON", f"{exc}: {clip(text)}") from exc


def _rejected(reason: str, where: str, expected: str, found: str) -> RowRejectedError:
    return RowRejectedError(reason, expected=f"{where}: {expected}", found=found)
