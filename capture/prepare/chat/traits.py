"""What a chat template wants of messages, found by rendering probe messages with it, not by a model's name."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from draftcache.capture.prepare.chat.rendering import Message, Renderer, Tools, row_time_limit
from draftcache.capture.prepare.rows.rejections import RowRejectedError

REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")
"""Keys by which data sets and templates call what an assistant thought before its answer."""
_WORD = "qxprobe"  # a word that no template writes by itself
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "A city."}}},
    },
}


@dataclass(frozen=True, kw_only=True)
class TemplateTraits:
    """What `probe_template` found, as the manifest records it."""

    system: bool
    """Whether a system message's text is rendered."""
    developer: bool
    """Whether a developer message's text is rendered. Else its role becomes `system`."""
    arguments: Literal["object", "text"] | None
    """The form in which tool calls' arguments are rendered without being encoded twice; None where calls are not."""
    reasoning: str | None
    """The key under which the template reads an assistant's reasoning; None where it reads none of REASONING_NAMES."""
    generation_prompt: bool
    """Whether asking for a generation prompt adds any text. Where it adds none, an answer begins behind the question,
    with all that the template writes there."""
    rewrites_history: bool
    """Whether an earlier answer is rendered otherwise once more messages follow it."""
    reads_date: bool
    """Whether the text holds today's date, which is pinned."""

    def as_json(self) -> dict[str, Any]:
        """The record for a manifest."""
        return asdict(self)


def probe_template(renderer: Renderer) -> TemplateTraits:
    """Find a template's traits by rendering some probe messages with it."""
    with row_time_limit():
        user = {"role": "user", "content": "Question."}
        answer = {"role": "assistant", "content": "Answer."}
        reasoning = next(
            (
                name
                for name in REASONING_NAMES
                if _WORD in (_text(renderer, [user, {**answer, name: f"{_WORD} reason"}]) or "")
            ),
            None,
        )
        return TemplateTraits(
            system=_renders_role(renderer, "system"),
            developer=_renders_role(renderer, "developer"),
            arguments=_arguments_form(renderer),
            reasoning=reasoning,
            generation_prompt=_text(renderer, [user]) != _text(renderer, [user], generation_prompt=True),
            rewrites_history=_rewrites_history(renderer, reasoning),
            reads_date=renderer.reads_date,
        )


def _renders_role(renderer: Renderer, role: str) -> bool:
    messages = [
        {"role": role, "content": f"{_WORD} rules."},
        {"role": "user", "content": "Question."},
        {"role": "assistant", "content": "Answer."},
    ]
    return _WORD in (_text(renderer, messages) or "")


def _arguments_form(renderer: Renderer) -> Literal["object", "text"] | None:
    """The form that shows up neither as Python's nor as text inside of text. Of two, objects, as engines give them."""
    city = f"{_WORD} city"
    wrong = {"object": ("{'city'",), "text": ('\\"city\\"',)}
    forms: dict[Literal["object", "text"], Any] = {"object": {"city": city}, "text": f'{{"city": "{city}"}}'}
    for form, arguments in forms.items():
        call = {"id": "abcdef123", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        messages: list[Message] = [
            {"role": "user", "content": "Question."},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": "weather", "tool_call_id": "abcdef123", "content": "rain"},
            {"role": "assistant", "content": "Answer."},
        ]
        text = _text(renderer, messages, [_TOOL]) or _text(renderer, messages[:2], [_TOOL]) or ""
        if city in text and not any(sign in text for sign in wrong[form]):
            return form
    return None


def _rewrites_history(renderer: Renderer, reasoning: str | None) -> bool:
    first: Message = {"role": "assistant", "content": "First answer."}
    if reasoning is not None:
        first[reasoning] = "A reason."
    messages: list[Message] = [
        {"role": "user", "content": "First question."},
        first,
        {"role": "user", "content": "Second question."},
        {"role": "assistant", "content": "Second answer."},
    ]
    early, late = _text(renderer, messages[:2]), _text(renderer, messages)
    if early is None or late is None:
        return False
    answered = early.rfind("First answer.")
    return not late.startswith(early[: answered + len("First answer.")])


def _text(
    renderer: Renderer, messages: list[Message], tools: Tools = None, *, generation_prompt: bool = False
) -> str | None:
    try:
        return renderer.render(messages, tools, generation_prompt=generation_prompt)
    except RowRejectedError:
        return None
