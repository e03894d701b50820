from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draftcache.capture.prepare.chat.encoding import ChatTokenizer
from draftcache.capture.prepare.chat.learned_rows import LearnedText
from draftcache.capture.prepare.chat.rendering import Renderer, check_template_compiles
from draftcache.capture.prepare.chat.settings import ChatSettings
from draftcache.capture.prepare.chat.template_check import check_against_transformers, template_difference
from draftcache.capture.prepare.chat.tokenizer_files import (
    SHIPPED_TEMPLATE,
    ChatTemplate,
    choose_template,
    load_tokenizer,
)
from draftcache.capture.prepare.rows.forms import ChatRow
from draftcache.capture.prepare.rows.rejections import RowRejectedError
from draftcache.store.common.errors import InputError
from support.chat_tokenizers import CHATML, save_tokenizer

# Turns with nothing between them but text: tokens merge across the boundaries of the assistant's spans.
BARE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ':' }}{% generation %}{{ m.content }}{% endgeneration %}"
    "{{ '\\n' }}{% else %}{{ m.content + '\\n' }}{% endif %}{% endfor %}"
)
PIECES = [
    "fox",
    " jumps",
    "\n",
    "\n\n",
    "é",
    "日本",
    "🎉",
    "👩‍👩‍👧",
    "e\u0301",
    "::",
    " ",
    "  ",
    "<|im_end|>",
    "<think>",
    "\x00",
    "\u2028",
]


def template_of(text: str) -> ChatTemplate:
    return ChatTemplate(plain=text, with_tools=text, source="test")


def row_of(*contents: str, tools: list[dict[str, Any]] | None = None) -> ChatRow:
    roles = ("user", "assistant")
    return ChatRow(messages=[{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)], tools=tools)


@pytest.fixture(scope="module")
def loaded(tokenizer_dir: Path) -> tuple[Any, Any]:
    return load_tokenizer(tokenizer_dir)


TAGS = ChatSettings(loss_mask="tags")


def only_text(ours: ChatTokenizer, row: ChatRow) -> LearnedText:
    (text,) = ours.learned(row).texts
    return text


def both_ways(loaded: tuple[Any, Any], template: str, row: ChatRow) -> tuple[list[Any], list[Any], LearnedText]:
    """[ids, mask] ours by the template's tags, [ids, mask] of transformers, and the text."""
    files, tokenizer = loaded
    ours = ChatTokenizer(files, template_of(template), TAGS)
    chat = only_text(ours, row)
    ids, mask = ours.encode([chat])[0]
    assert (ids.dtype, mask.dtype) == (np.uint32, np.bool_)
    expected = tokenizer.apply_chat_template(
        row.messages,
        tools=row.tools,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return [ids.tolist(), mask.astype(int).tolist()], [expected["input_ids"], expected["assistant_masks"]], chat


@pytest.mark.parametrize(
    "contents",
    [
        ("hi", "hello"),
        ("hi", ""),
        ("hi", "", "again", "", "more", "x"),
        ("hi 🎉", "👩‍👩‍👧🎉", "e\u0301", "\u0301combining first"),
        ("\n", "\n\nspaces around  ", "  ", " \n"),
        ("say <|im_end|> please", "<|im_end|> said <|im_start|>assistant"),
        ("日本語", "東京 ünïcödé"),
    ],
)
def test_ids_and_masks_equal_transformers(loaded: tuple[Any, Any], contents: tuple[str, ...]) -> None:
    ours, expected, _ = both_ways(loaded, CHATML, row_of(*contents))
    assert ours == expected
    assert 0 < sum(ours[1]) < len(ours[1])


def test_random_conversations_equal_transformers(loaded: tuple[Any, Any]) -> None:
    choose = random.Random(5)
    for _ in range(80):
        contents = ["".join(choose.choices(PIECES, k=choose.randrange(9))) for _ in range(2 * choose.randrange(1, 5))]
        ours, expected, _ = both_ways(loaded, CHATML, row_of(*contents))
        assert ours == expected, contents


def test_merges_across_span_boundaries_equal_transformers(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded
    crossing = 0
    for contents in [("why", ":tag:: yes\n", "q", "::\n"), ("a", "[[x]]\n\n", "\n", ":")]:
        ours, expected, chat = both_ways(loaded, BARE, row_of(*contents))
        assert ours == expected
        inside = tokenizer.decode([i for i, m in zip(*ours, strict=True) if m])
        crossing += inside != "".join(chat.text[first:last] for first, last in chat.spans)
    assert crossing == 2  # else no merge crossed a boundary and the test shows nothing


def test_a_last_character_of_several_tokens_is_wholly_the_assistants(loaded: tuple[Any, Any]) -> None:
    # transformers stops at the first token of the last character; the page's rule is every assistant token.
    _, tokenizer = loaded
    ours, expected, _ = both_ways(loaded, BARE, row_of("why", "so 👩"))
    assert ours[0] == expected[0]
    assert tokenizer.decode([i for i, m in zip(*ours, strict=True) if m]) == "so 👩"


def edited_tokenizer(directory: Path, template: str, **changes: Any) -> Path:
    """A tokenizer whose tokenizer.json has other top-level settings."""
    path = save_tokenizer(directory, template) / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return directory


def test_a_span_that_starts_at_a_trimmed_space_keeps_its_tokens(tmp_path: Path) -> None:
    trimming = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    files, tokenizer = load_tokenizer(edited_tokenizer(tmp_path / "trimming", BARE, post_processor=trimming))
    ours = ChatTokenizer(files, template_of(BARE), TAGS)
    ids, mask = ours.encode([only_text(ours, row_of("why", " the fox"))])[0]
    assert tokenizer.decode(ids[mask].tolist()) == " the fox"


def test_truncation_and_padding_in_the_file_are_ignored_as_transformers_does(tmp_path: Path) -> None:
    directory = edited_tokenizer(
        tmp_path / "cutting",
        CHATML,
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|im_start|>",
        },
    )
    ours, expected, _ = both_ways(load_tokenizer(directory), CHATML, row_of("the fox", "the dog"))
    assert ours == expected
    assert 3 < len(ours[0]) < 64


def test_an_empty_span_inside_a_token_marks_nothing(loaded: tuple[Any, Any]) -> None:
    files, _ = loaded
    text = "{{ ':' }}{% generation %}{{ messages[0].content }}{% endgeneration %}{{ ':' }}"
    ours = ChatTokenizer(files, template_of(text), TAGS)
    ids, mask = ours.encode([only_text(ours, row_of(""))])[0]
    assert len(ids) == 1  # "::" is one token, and the empty span lies inside it
    assert not mask.any()
    _, mask = ours.encode([only_text(ours, row_of("x"))])[0]
    assert mask.tolist() == [False, True, False]


def test_none_values_render_as_missing_keys_and_as_empty_contents(loaded: tuple[Any, Any]) -> None:
    files, tokenizer = loaded
    user = {"role": "user", "content": "hi"}
    with_nones = ChatRow(messages=[{**user, "name": None}, {"role": "assistant", "content": None}], tools=None)
    without = ChatRow(messages=[user, {"role": "assistant", "content": ""}], tools=None)
    ours, expected, _ = both_ways(loaded, CHATML, without)
    assert ours == expected
    chat = ChatTokenizer(files, template_of(CHATML))
    assert chat.learned(with_nones) == chat.learned(without)
    check_against_transformers(chat, tokenizer, [("f.jsonl", 1, with_nones)])


def test_variables_set_inside_a_generation_block_do_not_leak() -> None:
    text = (
        "{% set x = 'outer' %}{% generation %}{% set x = 'inner' %}{{ x }}{% endgeneration %}|{{ x }}|"
        "{{ y is defined }}{% generation %}{% set y = 1 %}{% endgeneration %}{{ y is defined }}"
    )
    found, spans = Renderer(template_of(text), {}).render_tagged(row_of("q", "a").messages, None)
    assert found == "inner|outer|FalseFalse"
    assert spans == [(0, 5), (17, 17)]


def test_a_refusing_template_names_its_reason(loaded: tuple[Any, Any]) -> None:
    row = ChatRow(messages=[{"role": "assistant", "content": "first"}], tools=None)
    with pytest.raises(RowRejectedError, match="starts with a user or system turn") as caught:
        Renderer(template_of(CHATML), {}).render(row.messages, None)
    assert caught.value.reason == "template-rejected"


def test_a_lone_surrogate_is_rejected_before_it_reaches_the_tokenizer() -> None:
    with pytest.raises(RowRejectedError, match=r"U\+D83D") as caught:
        Renderer(template_of(CHATML), {}).render(row_of("q", "half \ud83d").messages, None)
    assert caught.value.reason == "lone-surrogate"


def test_no_template_at_all_is_refused(tmp_path: Path) -> None:
    files, _ = load_tokenizer(save_tokenizer(tmp_path / "bare", None))
    with pytest.raises(InputError, match="expected a chat template, found none"):
        choose_template(files, None)


def test_a_template_that_is_not_jinja_is_refused() -> None:
    with pytest.raises(InputError, match="expected Jinja"):
        check_template_compiles(template_of("{% generation %}{% endfor %}"))


def test_a_directory_without_tokenizer_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match=str(path)):
            load_tokenizer(path)


def test_vocabulary_size_is_the_verifiers_where_its_config_is_there(tmp_path: Path) -> None:
    directory = save_tokenizer(tmp_path / "verifier", CHATML)
    files, tokenizer = load_tokenizer(directory)
    assert (files.vocab_size, files.vocab_size_from) == (len(tokenizer), "tokenizer")
    (directory / "config.json").write_text('{"vocab_size": 1024}')
    padded, _ = load_tokenizer(directory)
    assert (padded.vocab_size, padded.vocab_size_from) == (1024, "config.json")
    assert padded.hash == files.hash


def test_tokenizer_hash_follows_the_files_but_not_the_template(tmp_path: Path) -> None:
    first, _ = load_tokenizer(save_tokenizer(tmp_path / "a", CHATML))
    other_template, _ = load_tokenizer(save_tokenizer(tmp_path / "b", BARE))
    other_merges, _ = load_tokenizer(save_tokenizer(tmp_path / "c", CHATML, vocab_size=300))
    assert first.hash == other_template.hash
    config = tmp_path / "b" / "tokenizer_config.json"  # where older tokenizers keep the template
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": BARE}))
    assert load_tokenizer(tmp_path / "b")[0].hash == first.hash
    assert first.hash != other_merges.hash


def test_a_template_difference_is_reported() -> None:
    def difference(given: str, own: str, row: ChatRow) -> str | None:
        return template_difference(Renderer(template_of(given), {}), Renderer(template_of(own), {}), row)

    untagged = CHATML.replace("{%- generation -%}", "").replace("{%- endgeneration -%}", "")
    other = CHATML.replace("{{- '\\n' -}}", "{{- '\\n' if message.content | length < 9 else ' ' -}}")
    short, long = row_of("q", "same"), row_of("q", "a much longer answer")
    assert difference(CHATML, untagged, long) is None
    assert difference(CHATML, other, short) is None
    assert (difference(CHATML, other, long) or "").startswith("at character")
    assert "refuses" in (difference(CHATML, "{{ raise_exception('never') }}", short) or "")


def test_ids_that_differ_from_transformers_are_refused(loaded: tuple[Any, Any]) -> None:
    files, tokenizer = loaded
    sample = [("f.jsonl", 7, row_of("q", "a"))]
    ours = ChatTokenizer(files, template_of(CHATML))
    check_against_transformers(ours, tokenizer, sample)

    class Meddling:
        def apply_chat_template(self, *arguments: Any, **settings: Any) -> dict[str, list[int]]:
            return {"input_ids": [1, *tokenizer.apply_chat_template(*arguments, **settings)["input_ids"]]}

    with pytest.raises(InputError, match=r"f.jsonl:7: .*Meddling does more"):
        check_against_transformers(ours, Meddling(), sample)


# --- the shipped template ---

NEMOTRON = SHIPPED_TEMPLATE.read_text(encoding="utf-8")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds. ",
            "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
        },
    }
]


def spans_of(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> tuple[str, list[str]]:
    text, spans = Renderer(template_of(NEMOTRON), {}).render_tagged(messages, tools)
    return text, [text[first:last] for first, last in spans]


def test_nemotron_template_marks_what_the_model_writes() -> None:
    text, spans = spans_of(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "q1"},
            {"role": "assistant", "content": "a1", "reasoning_content": "old thought"},
            {"role": "user", "content": "q2"},
            {"role": "assistant", "content": "a2", "reasoning_content": "new thought"},
        ]
    )
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nq1<|im_end|>\n"
        "<|im_start|>assistant\n<think></think>a1<|im_end|>\n<|im_start|>user\nq2<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nnew thought\n</think>\na2<|im_end|>\n"
    )
    assert spans == ["a1<|im_end|>", "new thought\n</think>\na2<|im_end|>"]


def test_nemotron_template_agrees_on_both_forms_of_reasoning() -> None:
    user = {"role": "user", "content": "q"}
    apart = spans_of([user, {"role": "assistant", "content": "a", "reasoning_content": "why"}])
    inline = spans_of([user, {"role": "assistant", "content": "<think>\nwhy\n</think>\na"}])
    assert apart == inline


def test_nemotron_template_generation_prompt_is_a_prefix_of_the_turn() -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    user = {"role": "user", "content": "q"}
    for enable_thinking, reasoning in ((True, "why"), (False, None)):
        (prompt,), _ = render_jinja_template(
            conversations=[[user]],
            chat_template=NEMOTRON,
            add_generation_prompt=True,
            enable_thinking=enable_thinking,
        )
        text, (span,) = spans_of([user, {"role": "assistant", "content": "a", "reasoning_content": reasoning}])
        assert text == prompt + span + "\n"


def test_nemotron_template_tools() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": [2]}}}
    text, spans = spans_of(
        [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "", "reasoning_content": "add", "tool_calls": [call, call]},
            {"role": "tool", "content": "3"},
            {"role": "tool", "content": "4"},
            {"role": "assistant", "content": "done"},
        ],
        TOOLS,
    )
    assert "<function>\n<name>add</name>\n<description>Adds.</description>\n<parameters>" in text
    assert '<required>["a"]</required>' in text
    assert (
        "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\n4\n</tool_response>\n<|im_end|>\n"
        in text
    )
    one_call = (
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n[2]\n</parameter>\n"
        "</function>\n</tool_call>\n"
    )
    assert spans == [f"add\n</think>\n{one_call}{one_call}<|im_end|>", "done<|im_end|>"]


@pytest.mark.parametrize(
    ("message", "found"),
    [
        ({"role": "narrator", "content": "x"}, "narrator"),
        ({"role": "assistant", "content": [{"type": "text", "text": "x"}]}, "expected text"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}, "parse the JSON"),
    ],
)
def test_nemotron_template_refuses_what_it_would_render_wrongly(message: dict[str, Any], found: str) -> None:
    with pytest.raises(RowRejectedError, match=found):
        spans_of([{"role": "user", "content": "q"}, message])


def test_a_template_that_never_ends_costs_its_row_only(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = (
        "{% if messages | length > 5 %}{% for i in range(99999) %}{% for j in range(99999) %}"
        "{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}{% endif %}" + BARE
    )
    ours = ChatTokenizer(loaded[0], template_of(endless))
    monkeypatch.setattr("draftcache.capture.prepare.chat.rendering.ROW_SECONDS", 0.2)
    with pytest.raises(RowRejectedError, match=r"rendering takes more than 0\.2 s"):
        ours.learned(row_of(*"abcdef"))
    assert only_text(ours, row_of("a", "b")).text == "a\n:b\n"
    sum(range(20_000_000))  # the timer of a row that is done does not fire later


@pytest.mark.parametrize(("reasoning", "arguments"), [("why", {}), (None, {"enable_thinking": False})])
def test_nemotron_templates_tags_are_what_the_generation_prompt_tells(
    loaded: tuple[Any, Any], reasoning: str | None, arguments: dict[str, Any]
) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    thought = {} if reasoning is None else {"reasoning_content": reasoning}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1", **thought},
        {"role": "user", "content": "q2"},
        {"role": "assistant", "content": None, "tool_calls": [call], **thought},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "a2", **thought},
    ]
    files = replace(loaded[0], stop_tokens=("<|im_end|>",))
    settings = ChatSettings(template_args=arguments)
    found = ChatTokenizer(files, template_of(NEMOTRON), settings).learned(ChatRow(messages=messages, tools=TOOLS))
    assert not [note for note in found.notes if "tags" in note]
    # With thinking, the first answer's is gone from the later texts, so each answer has a row of its own.
    assert len(found.texts) == (3 if reasoning else 1)
    tagged = ChatTokenizer(files, template_of(NEMOTRON), replace(settings, loss_mask="tags"))
    ours = [found.texts[-1].text[first:last] for first, last in found.texts[-1].spans]
    (theirs,) = tagged.learned(ChatRow(messages=messages, tools=TOOLS)).texts
    assert theirs.text == found.texts[-1].text
    assert [theirs.text[first:last] for first, last in theirs.spans][-len(ours) :] == ours


def test_nemotron_templates_tags_leave_out_the_end_of_a_thought_that_is_not_there(loaded: tuple[Any, Any]) -> None:
    """Where thinking is on, and a row has none: the prompt opens the thought, and the model writes its end."""
    files = replace(loaded[0], stop_tokens=("<|im_end|>",))
    found = ChatTokenizer(files, template_of(NEMOTRON)).learned(row_of("q", "a"))
    (text,) = found.texts
    assert [text.text[first:last] for first, last in text.spans] == ["</think>a<|im_end|>"]
    assert [note for note in found.notes if "tags" in note] == [
        "generation tags leave out at an answer's begin: '</think>'"
    ]
