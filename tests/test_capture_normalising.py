"""Messages become what a chat template wants, which probe messages find out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from draftcache.capture.prepare.chat.content_check import vanished, vanished_tools
from draftcache.capture.prepare.chat.normalising import normalise
from draftcache.capture.prepare.chat.rendering import Renderer
from draftcache.capture.prepare.chat.tokenizer_files import ChatTemplate
from draftcache.capture.prepare.chat.traits import TemplateTraits, probe_template
from draftcache.capture.prepare.rows.forms import ChatRow
from draftcache.capture.prepare.rows.rejections import RowRejectedError

PLAIN = TemplateTraits(
    system=True,
    developer=False,
    arguments="object",
    reasoning="reasoning_content",
    generation_prompt=True,
    rewrites_history=False,
    reads_date=False,
)
ROLES = "{%- for m in messages -%}{{- '<' ~ m.role ~ '>' ~ m.content -}}{%- endfor -%}"
CALLS = "{%- for c in m.tool_calls or [] -%}{{- c.function.name ~ FORM -}}{%- endfor -%}{%- endfor -%}"


def traits_of(text: str) -> TemplateTraits:
    return probe_template(Renderer(ChatTemplate(plain=text, with_tools=text, source="test"), {}))


def calls(form: str) -> str:
    return ROLES.removesuffix("{%- endfor -%}") + CALLS.replace("FORM", form)


def row(*messages: dict[str, Any]) -> ChatRow:
    return ChatRow(messages=list(messages), tools=None)


def only(message: dict[str, Any], traits: TemplateTraits = PLAIN) -> dict[str, Any]:
    return normalise(row(message), traits).messages[0]


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        ("(c.function.arguments | tojson)", "object"),  # a text would be encoded twice
        ("c.function.arguments", "text"),  # an object would be Python's
        ("('' ~ c.function.arguments.city)", "object"),
        ("(c.function.arguments if c.function.arguments is string else c.function.arguments | tojson)", "object"),
        ("('```' + c.function.arguments + '```')", "text"),  # an object is refused
        ("''", None),
    ],
)
def test_the_form_of_arguments_is_probed(form: str, wanted: str | None) -> None:
    assert traits_of(calls(form)).arguments == wanted


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_the_name_of_reasoning_is_probed(name: str) -> None:
    text = ROLES.replace("m.content -}}", f"m.content ~ m.{name} -}}}}")
    assert traits_of(text).reasoning == name
    assert traits_of(ROLES).reasoning is None


def test_roles_dates_prompts_and_history_are_probed() -> None:
    known = (
        "{%- for m in messages -%}{%- if m.role in ['user', 'assistant', 'system'] -%}{{- m.content -}}{%- endif -%}"
    )
    found = traits_of(known + "{%- endfor -%}")
    assert (found.system, found.developer) == (True, False)
    assert traits_of(ROLES).developer
    assert not traits_of(ROLES).reads_date
    assert traits_of(ROLES + "{{- strftime_now('%Y') -}}").reads_date
    assert not traits_of(ROLES).generation_prompt
    assert traits_of(ROLES + "{%- if add_generation_prompt -%}{{- '<assistant>' -}}{%- endif -%}").generation_prompt
    assert not traits_of(ROLES).rewrites_history
    cut = ROLES.replace("m.content -}}", "(m.content if loop.last or m.role != 'assistant' else '') -}}")
    assert traits_of(cut).rewrites_history


def test_parts_become_text() -> None:
    parts = [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]
    assert only({"role": "user", "content": parts})["content"] == "a\nb\nc"
    thought = [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "yes"}]
    found = only({"role": "assistant", "content": thought})
    assert found == {"role": "assistant", "content": "yes", "reasoning_content": "hm"}


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], r"message 1 \(user\).*kind 'image_url'"),
        ([{"type": "text", "text": 3}], "kind 'text'"),
        ([7], "kind 'text'"),
        ({"a": 1}, r"message 1 \(user\): content that is text"),
        (5, "found 5"),
        ([{"type": "reasoning", "text": "hm"}], "no assistant wrote"),
    ],
)
def test_content_that_text_cannot_hold_is_named(content: Any, found: str) -> None:
    with pytest.raises(RowRejectedError, match=found) as caught:
        only({"role": "user", "content": content})
    assert caught.value.reason == "content-kind"


def test_null_is_the_empty_text_and_other_nulls_go() -> None:
    assert only({"role": "assistant", "content": None, "name": None}) == {"role": "assistant", "content": ""}
    assert only({"role": "assistant"}) == {"role": "assistant", "content": ""}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_gets_the_templates_name(name: str) -> None:
    message = {"role": "assistant", "content": "a", name: "why"}
    assert only(message)["reasoning_content"] == "why"
    assert set(only(message)) == {"role", "content", "reasoning_content"}
    unknown = TemplateTraits(**{**PLAIN.as_json(), "reasoning": None})
    assert only(message, unknown) == message  # where the content check finds that it vanished
    assert "reasoning_content" not in only({**message, name: ""})


def test_arguments_take_the_templates_form() -> None:
    text, value = '{"city": "Oslo"}', {"city": "Oslo"}
    wants_text = TemplateTraits(**{**PLAIN.as_json(), "arguments": "text"})
    for given in (text, value):
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": given}}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        assert only(message)["tool_calls"][0] == {**call, "function": {"name": "f", "arguments": value}}
        found = only(message, wants_text)["tool_calls"][0]["function"]["arguments"]
        assert json.loads(found) == value
    for empty in (None, ""):
        message = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": empty}]}
        assert only(message)["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {}}}]


def test_a_legacy_function_call_is_a_tool_call() -> None:
    call = {"name": "f", "arguments": '{"a": 1}'}
    expected = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    assert only({"role": "assistant", "function_call": call})["tool_calls"] == expected
    for calls in ([call], call):
        assert only({"role": "assistant", "tool_calls": json.dumps(calls)})["tool_calls"] == expected
    assert only({"role": "function", "name": "f", "content": "2"})["role"] == "tool"


@pytest.mark.parametrize(
    ("tool_calls", "found"),
    [
        ("[", "tool_calls as JSON"),
        ({"a": 1}, "a function's name"),
        (7, "a list of tool calls"),
        ([3], "a function's name"),
        ([{"function": {"arguments": {}}}], "a function's name"),
        ([{"function": {"name": "f", "arguments": "{city"}}], "arguments of a tool call as JSON"),
    ],
)
def test_tool_calls_that_are_none_are_named(tool_calls: Any, found: str) -> None:
    with pytest.raises(RowRejectedError, match=rf"message 2 \(assistant\).*{found}") as caught:
        normalise(row({"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": tool_calls}), PLAIN)
    assert caught.value.reason == "tool-call"


def test_a_developer_is_the_system_where_the_template_knows_none() -> None:
    message = {"role": "developer", "content": "x"}
    assert only(message)["role"] == "system"
    assert only(message, TemplateTraits(**{**PLAIN.as_json(), "developer": True}))["role"] == "developer"


def test_the_row_itself_is_left_as_it_is() -> None:
    message = {"role": "assistant", "content": None, "reasoning": "x", "tool_calls": [{"name": "f", "arguments": "{}"}]}
    before = json.dumps(message)
    only(message)
    assert json.dumps(message) == before


@pytest.mark.parametrize(
    ("message", "text", "keys"),
    [
        ({"role": "user", "content": "  a b "}, "<a b>", []),
        ({"role": "user", "content": "a b"}, "<a c>", ["content"]),
        ({"role": "assistant", "content": "<think>\nwhy\n</think>\nso"}, "<think>why</think> so", []),
        ({"role": "assistant", "content": "so", "reasoning": "why"}, "so", ["reasoning"]),
        ({"role": "assistant", "content": "line one\n\nline two"}, "line one\nline two", []),
        ({"role": "assistant", "tool_calls": [{"id": "z", "function": {"name": "f", "arguments": {"k": 'say "x"'}}}]},
         'f {"k": "say \\"x\\""}', []),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"k": "v"}}}]}, "f(k)",
         ["tool_calls"]),
        ({"role": "user", "content": "a", "name": "Ann", "id": "7", "mood": "blue"}, "a", ["mood"]),
    ],
)  # fmt: skip
def test_text_that_vanishes_is_found(message: dict[str, Any], text: str, keys: list[str]) -> None:
    assert vanished(message, text) == keys


def test_tools_that_vanish_are_found() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}, {"name": "mul"}]
    assert vanished_tools(tools, "add only") == ["mul"]
    assert vanished_tools(None, "") == []
