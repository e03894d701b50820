from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from draftcache.capture.prepare.rows.forms import ChatRow, parse_row
from draftcache.capture.prepare.rows.rejections import RowRejectedError
from draftcache.capture.prepare.rows.roles import RoleMap
from draftcache.capture.prepare.rows.token_rows import TokenRow
from draftcache.store.common.errors import InputError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello 🎉"}]


def encode(row: Any) -> bytes:
    return json.dumps(row).encode()


def json_row(**row: Any) -> ChatRow:
    parsed = parse_row(encode(row))
    assert isinstance(parsed, ChatRow)
    return parsed


def token_row(row: Any) -> tuple[list[int], list[bool]]:
    parsed = parse_row(row)
    assert isinstance(parsed, TokenRow)
    assert (parsed.token_ids.dtype, parsed.loss_mask.dtype) == (np.uint32, np.bool_)
    return parsed.token_ids.tolist(), parsed.loss_mask.tolist()


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


PADDED = {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]}


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
    row = parse_row(encode({"conversations": [{"from": speaker, "value": "x", "name": "Ann"}]}))
    assert isinstance(row, ChatRow)
    assert row.messages == [{"name": "Ann", "role": role, "content": "x"}]


def test_sharegpt_system_and_tools_beside_the_turns() -> None:
    row = parse_row(
        encode({"conversations": [{"from": "human", "value": "x"}], "system": "be brief", "tools": '[{"name": "f"}]'})
    )
    assert isinstance(row, ChatRow)
    assert [message["role"] for message in row.messages] == ["system", "user"]
    assert row.tools == [{"type": "function", "function": {"name": "f"}}]


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
        (encode({"conversations": [{"from": "martian", "value": "x"}]}), "unknown-role", "martian"),
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
        (encode({"input_ids": [1, 2]}), "bad-loss-mask", "input_ids"),
        (encode({"input_ids": [1, 2], "labels": [-100]}), "length-mismatch", "1 values of labels"),
        (encode({"input_ids": [1, 2], "labels": [2, -100]}), "label-mismatch", "label 2 for id 1 at position 0"),
        (encode({"input_ids": [1, 2], "labels": [1.0, 2.0]}), "bad-labels", "1.0"),
        (encode(PADDED | {"attention_mask": [1, 0, 1]}), "bad-attention-mask", "position 1"),
        (encode(PADDED | {"attention_mask": [0, 0, 0]}), "empty-conversation", "all 0"),
        (encode(PADDED | {"attention_mask": [1, 1]}), "length-mismatch", "2 values"),
        (encode({"messages": None}), "unknown-form", "messages"),
        (encode({"messages": [user("a"), {"from": "gpt"}]}), "bad-message", "message 2"),
        (encode({"messages": [assistant("a", weight=0.5)]}), "bad-weight", "0.5 in message 1"),
        (encode({"messages": [user("a"), assistant("a", train="no")]}), "bad-train", "no in message 2"),
        (encode({"messages": MESSAGES, "system": 3}), "bad-system", "3"),
        (encode({"prompt": "a", "completion": 3}), "bad-message", "3"),
        (encode({"prompt": [], "completion": "b"}), "empty-conversation", "[]"),
        (encode({"prompt": "a", "chosen": "b", "rejected": "c"}), "unknown-form", "chosen"),
        (encode({"instruction": "a"}), "unknown-form", "instruction"),
        (encode({"instruction": 3, "output": "b"}), "bad-message", "3"),
        (encode({"instruction": "a", "output": "b", "history": "c"}), "bad-message", "c"),
        (encode({"instruction": "a", "output": "b", "history": [["c"]]}), "bad-message", "['c']"),
    ],
)
def test_bad_rows_say_what_was_expected_and_found(line: bytes, reason: str, found: str) -> None:
    with pytest.raises(RowRejectedError) as caught:
        parse_row(line)
    assert caught.value.reason == reason
    assert caught.value.expected
    assert found in caught.value.found
    assert len(caught.value.found) < 400


def test_rows_of_other_trainers() -> None:
    for key in ("conversations", "conversation", "messages"):
        assert json_row(**{key: MESSAGES}).messages == MESSAGES
    mixed = [{"from": "human", "value": "hi"}, {"role": "Assistant", "content": "yo"}]
    assert json_row(conversations=mixed).messages == [user("hi"), assistant("yo")]
    assert token_row(encode({"input_ids": [5, 9, 7], "loss_mask": [0, 1, 1]})) == ([5, 9, 7], [False, True, True])
    assert token_row(encode({"input_ids": [5, 9, 7], "labels": [-100, 9, 7]})) == ([5, 9, 7], [False, True, True])


def test_each_message_is_told_by_its_own_keys() -> None:
    """A table has one type for all of a column's messages: the other spelling's keys are there, and None."""
    turns = [
        {"from": "human", "value": "hi", "role": None, "content": None},
        {"from": None, "value": None, "role": "assistant", "content": "yo"},
    ]
    assert json_row(conversations=turns).messages == [user("hi"), assistant("yo")]
    assert json_row(messages=[{"role": "user", "value": "a"}, {"from": "gpt", "content": "b"}]).messages == [
        user("a"),
        assistant("b"),
    ]


def test_a_prompt_and_its_answer() -> None:
    said = [user("a"), assistant("b")]
    for key in ("completion", "response"):
        assert json_row(**{"prompt": "a", key: "b"}) == ChatRow(messages=said, tools=None)
    asked = [user("c"), assistant("d"), user("a")]
    row = json_row(prompt=asked, completion=[assistant("b"), user("e"), assistant("f", weight=0)])
    assert row.messages == [*asked, assistant("b"), user("e"), assistant("f")]
    assert row.unlearned == {1, 5}
    assert json_row(prompt=asked, completion="b").messages == [*asked, assistant("b")]


def test_alpaca() -> None:
    assert json_row(instruction="a", output="b", input="").messages == [user("a"), assistant("b")]
    row = json_row(instruction="a", input="x", output="b", system="s", history=[["q", "r"]])
    assert row.messages == [
        {"role": "system", "content": "s"},
        user("q"),
        assistant("r"),
        user("a\nx"),
        assistant("b"),
    ]
    assert not row.unlearned


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_text_beside_the_messages_comes_first(key: str) -> None:
    system = {"role": "system", "content": "s"}
    row = json_row(**{"messages": [user("a"), assistant("b", train=False)], key: "s"})
    assert row == ChatRow(messages=[system, user("a"), assistant("b")], tools=None, unlearned=frozenset({2}))
    for role in ("system", "developer"):
        own = [{"role": role, "content": "own"}, *MESSAGES]
        assert json_row(**{"messages": own, key: "s"}).messages == own
    assert json_row(**{"messages": MESSAGES, key: " "}).messages == MESSAGES


def test_marked_messages_carry_no_loss_and_lose_their_marks() -> None:
    marks: list[dict[str, Any]] = [{"weight": 0}, {"weight": 1}, {"weight": 0.0}, {"train": False}, {"train": True}]
    messages = [user("a") | {"weight": 0}, *(assistant("b", **mark) for mark in [*marks, {"weight": None}])]
    row = json_row(messages=messages)
    assert row.messages == [user("a"), *[assistant("b")] * 6]
    assert row.unlearned == {1, 3, 4}


def test_tools_become_what_engines_take() -> None:
    wrapped = {"type": "function", "function": {"name": "f", "parameters": {}}}
    bare = {"name": "f", "parameters": {}}
    kinds: list[Any] = [[bare], [wrapped], [bare | {"type": "function"}], json.dumps([bare]), [json.dumps(bare)]]
    for tools in kinds:
        assert json_row(messages=MESSAGES, tools=tools).tools == [wrapped]
        assert json_row(messages=MESSAGES, functions=tools).tools == [wrapped]
    assert json_row(messages=MESSAGES, tools=[{"type": "web_search"}]).tools == [{"type": "web_search"}]
    for nothing in (None, "", " "):
        assert json_row(messages=MESSAGES, tools=nothing).tools is None


@pytest.mark.parametrize("name", ["Assistant", "bot", "bard", "BING", "gpt4", "claude", " ai "])
def test_spellings_of_roles_hold_for_both_keys(name: str) -> None:
    for message in ({"role": name, "content": "x"}, {"from": name, "value": "x"}):
        assert json_row(messages=[message]).messages == [assistant("x")]


def test_users_add_names_of_roles() -> None:
    line = encode({"messages": [user("a"), {"role": "Martian", "content": "x"}]})
    with pytest.raises(RowRejectedError) as caught:
        parse_row(line)
    assert caught.value.reason == "unknown-role"
    assert "--role 'Martian=ROLE'" in caught.value.expected
    assert caught.value.found == "role 'Martian' in message 2"
    roles = RoleMap.with_names(["martian=assistant", "a=b=tool", "gpt=user"])
    row = parse_row(line, roles)
    assert isinstance(row, ChatRow)
    assert row.messages == [user("a"), assistant("x")]
    assert [roles.role(name) for name in ("A=B", "gpt", "developer", "venusian")] == ["tool", "user", "developer", None]


@pytest.mark.parametrize("text", ["martian", "martian=", "=user", "martian=robot", "user=assistant", ""])
def test_bad_names_of_roles_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--role"):
        RoleMap.with_names([text])


def test_a_name_with_two_roles_is_refused() -> None:
    with pytest.raises(InputError, match="one ROLE per NAME"):
        RoleMap.with_names(["x=user", "X=tool"])


@pytest.mark.parametrize("to_values", [list, tuple, np.asarray])
def test_padding_is_dropped(to_values: Callable[[list[int]], Any]) -> None:
    row = {
        "input_ids": to_values([0, 0, 5, 9, 7, 0]),
        "labels": to_values([-100, -100, -100, 9, 7, -100]),
        "attention_mask": to_values([0, 0, 1, 1, 1, 0]),
    }
    assert token_row(row) == ([5, 9, 7], [False, True, True])


def test_keys_that_a_table_filled_with_none_are_dropped() -> None:
    """All but a message's content, whose None is a message without text."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"city": "Oslo", "day": None}}}
    parts = np.asarray([{"type": "text", "text": "a", "image": None}], dtype=object)
    row = parse_row(
        {
            "messages": np.asarray(
                [
                    {"role": "user", "content": parts, "tool_calls": None, "weight": None},
                    {"role": "assistant", "content": None, "tool_calls": [call], "weight": np.float64(0)},
                ],
                dtype=object,
            ),
            "tools": [{"name": "f", "parameters": {"x": {"type": "string"}, "y": None}}],
            "token_ids": None,
            "prompt": None,
        }
    )
    assert isinstance(row, ChatRow)
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"city": "Oslo"}}}
    assert row.messages == [user([{"type": "text", "text": "a"}]), assistant(None, tool_calls=[call])]
    assert row.tools == [{"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "string"}}}}]
    assert row.unlearned == {1}


def test_a_sharegpt_turn_that_is_a_call() -> None:
    call = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": call},
        {"from": "observation", "value": "r"},
    ]
    row = parse_row(encode({"conversations": turns}))
    assert isinstance(row, ChatRow)
    assert row.messages[1] == {"role": "assistant", "content": "", "tool_calls": call}
    assert row.messages[2]["role"] == "tool"
