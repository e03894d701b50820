"""Which text carries loss: by the generation prompt, on templates of every kind, without generation tags."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draftcache.capture.prepare.chat.encoding import ChatTokenizer
from draftcache.capture.prepare.chat.learned_rows import REWRITTEN, LearnedRow
from draftcache.capture.prepare.chat.settings import ChatSettings, parse_template_args
from draftcache.capture.prepare.chat.tokenizer_files import ChatTemplate, TokenizerFiles, load_tokenizer
from draftcache.capture.prepare.rows.forms import ChatRow
from draftcache.capture.prepare.rows.rejections import RowRejectedError
from draftcache.store.common.errors import InputError
from support.chat_templates import CONVERSATION, FIRST, KINDS, SECOND, TemplateKind


def template_of(text: str) -> ChatTemplate:
    return ChatTemplate(plain=text, with_tools=text, source="test")


@pytest.fixture(scope="module")
def files(tokenizer_dir: Path) -> TokenizerFiles:
    return load_tokenizer(tokenizer_dir)[0]


def tokenizer_of(files: TokenizerFiles, kind: TemplateKind, **settings: Any) -> ChatTokenizer:
    files = replace(files, stop_tokens=kind.stops, special_tokens={"bos_token": "<|bos|>", "eos_token": "<|eos|>"})
    return ChatTokenizer(files, template_of(kind.text), ChatSettings(template_args=kind.variables, **settings))


def conversation(kind: TemplateKind) -> ChatRow:
    messages = CONVERSATION if kind.system or "system" in kind.text else CONVERSATION[1:]
    if "no system role" in kind.text:
        messages = CONVERSATION[1:]
    return ChatRow(messages=messages, tools=None)


def answers_of(row: LearnedRow) -> list[list[str]]:
    return [[text.text[first:last] for first, last in text.spans] for text in row.texts]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_answers_are_what_the_model_would_write(files: TokenizerFiles, kind: TemplateKind) -> None:
    ours = tokenizer_of(files, kind)
    row = ours.learned(conversation(kind))
    assert answers_of(row) == kind.answers
    dropped = {"text not learned or not rendered: assistant's reasoning_content"}
    noticed = set(row.notes) - {REWRITTEN, "rows added: one per answer"} - dropped
    if kind.system or "system" not in kind.text:
        noticed -= {"text not learned or not rendered: system's content"}
    assert noticed == set(kind.notes)
    assert ours.conversations.traits.rewrites_history == kind.rewrites
    assert (ours.conversations.traits.reasoning is not None) == kind.reasoning
    assert ours.conversations.traits.system == kind.system


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_each_row_begins_with_what_was_served(files: TokenizerFiles, kind: TemplateKind) -> None:
    """With --turns each, an answer stands behind the prompt that the engine gives the model, up to where they part."""
    ours = tokenizer_of(files, kind, turns="each")
    row = conversation(kind)
    messages = ours.conversations.normalised(row).messages
    questions = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    for index, text in zip(questions, ours.learned(row).texts, strict=True):
        prompt = ours.renderer.render(messages[:index], None, generation_prompt=True)
        ((start, end),) = text.spans
        assert prompt.startswith(text.text[:start])
        assert text.text[start:end].count(str(messages[index]["content"])) == 1
        assert "prime?" not in text.text[start:end]


def test_a_kind_of_which_the_test_would_not_hold(files: TokenizerFiles) -> None:
    """Negative control: a template whose prompt is not before its answers has no answers by the prompt."""
    bad = KINDS["chatml, generic in the role"]
    bad = replace(bad, text=bad.text.replace("{{- '<|im_start|>'", "{{- loop.length ~ '<|im_start|>'"))
    bad = replace(bad, text=bad.text.replace("'<|im_start|>assistant", "'<|start|>assistant"))
    with pytest.raises(RowRejectedError, match=r"message 3 \(assistant\) to be rendered behind") as caught:
        tokenizer_of(files, bad).learned(conversation(bad))
    assert caught.value.reason == "no-answer-found"
    assert "at character 0" in str(caught.value)


def test_turns(files: TokenizerFiles) -> None:
    kind = KINDS["history loses its thinking"]
    row = conversation(kind)
    every = tokenizer_of(files, kind, turns="all").learned(row)
    assert answers_of(every) == [[FIRST + "<|im_end|>", kind.answers[1][0]]]
    assert every.notes.counts["answers learned otherwise than they were generated, by --turns all"] == 1
    last = tokenizer_of(files, kind, turns="last").learned(row)
    assert answers_of(last) == [kind.answers[1]]
    assert last.notes.counts["answers without loss, by --turns last"] == 1
    plain = KINDS["chatml, generic in the role"]
    each = tokenizer_of(files, plain, turns="each").learned(row)
    assert answers_of(each) == [[FIRST + "<|im_end|>"], [SECOND + "<|im_end|>"]]
    assert each.texts[1].text.startswith(each.texts[0].text)
    assert each.notes.counts["rows added: one per answer"] == 1


def test_what_comes_before_a_rewritten_answer_must_be_as_it_was(files: TokenizerFiles) -> None:
    kind = KINDS["the system message goes to the last question"]
    with pytest.raises(RowRejectedError, match="--turns each") as caught:
        tokenizer_of(files, kind, turns="all").learned(conversation(kind))
    assert caught.value.reason == "history-rewritten"


def test_messages_without_loss(files: TokenizerFiles) -> None:
    kind = KINDS["chatml, generic in the role"]
    row = replace(conversation(kind), unlearned=frozenset({2}))
    assert answers_of(tokenizer_of(files, kind).learned(row)) == [[SECOND + "<|im_end|>"]]
    tagged = KINDS["tags around exactly the answer"]
    assert answers_of(tokenizer_of(files, tagged, loss_mask="tags").learned(row)) == [[SECOND + "<|im_end|>"]]
    with pytest.raises(RowRejectedError, match="7 blocks"):
        tokenizer_of(files, KINDS["tags around too much"], loss_mask="tags").learned(row)


def test_a_first_answer_to_nothing_carries_no_loss(files: TokenizerFiles) -> None:
    kind = KINDS["chatml with a system message of its own"]  # it looks at the first message
    row = ChatRow(messages=[{"role": "assistant", "content": "Welcome."}, *CONVERSATION[1:]], tools=None)
    found = tokenizer_of(files, kind).learned(row)
    assert answers_of(found) == kind.answers
    assert any(note.startswith("answers to nothing") for note in found.notes)


def test_a_content_that_begins_as_the_prompt_goes_on(files: TokenizerFiles) -> None:
    """The prompt's `<think>` and the answer's `<b>` share a character, which is the answer's all the same."""
    kind = KINDS["the prompt opens thinking that the text lacks"]
    row = ChatRow(
        messages=[{"role": "user", "content": "q"}, {"role": "assistant", "content": "<b>bold</b>"}], tools=None
    )
    assert answers_of(tokenizer_of(files, kind).learned(row)) == [["<b>bold</b><|im_end|>"]]


def test_an_answer_ends_at_the_first_stop_that_it_holds(files: TokenizerFiles) -> None:
    kind = KINDS["chatml, generic in the role"]
    row = ChatRow(
        messages=[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a<|im_end|>never"}], tools=None
    )
    found = tokenizer_of(files, kind).learned(row)
    assert answers_of(found) == [["a<|im_end|>"]]
    assert "text not learned or not rendered: assistant's content" in found.notes


def test_the_date_is_pinned(files: TokenizerFiles) -> None:
    kind = KINDS["headers with today's date"]
    row = conversation(kind)
    assert "Today: 01 Jan 2026" in tokenizer_of(files, kind).learned(row).texts[0].text
    other = tokenizer_of(files, kind, date="2024-07-26")
    assert "Today: 26 Jul 2024" in other.learned(row).texts[0].text
    assert other.conversations.traits.reads_date
    tagged = replace(kind, text=kind.text.replace("{%- for m", "{%- generation -%}x{%- endgeneration -%}{%- for m"))
    found = tokenizer_of(files, tagged, loss_mask="tags").learned(row).texts[0].text
    assert "Today: 01 Jan 2026" in found


def test_a_system_message_for_rows_that_have_none(files: TokenizerFiles) -> None:
    kind = KINDS["chatml, generic in the role"]
    ours = tokenizer_of(files, kind, system="Speak Latin.")
    row = ChatRow(messages=CONVERSATION[1:], tools=None, unlearned=frozenset({1}))
    found = ours.learned(row)
    assert found.texts[0].text.startswith("<|im_start|>system\nSpeak Latin.<|im_end|>\n")
    assert answers_of(found) == [[SECOND + "<|im_end|>"]]
    assert "Latin" not in ours.learned(conversation(kind)).texts[0].text


def test_strict_sets_rows_aside_whose_text_vanishes(files: TokenizerFiles) -> None:
    kind = KINDS["chatml, generic in the role"]
    with pytest.raises(RowRejectedError, match="assistant's reasoning_content") as caught:
        tokenizer_of(files, kind, strict=True).learned(conversation(kind))
    assert caught.value.reason == "text-vanished"
    thinking = KINDS["chatml with reasoning in every turn"]
    assert tokenizer_of(files, thinking, strict=True).learned(conversation(thinking)).texts


def test_the_refused_message_is_named(files: TokenizerFiles) -> None:
    kind = KINDS["another name for the assistant, no system role"]
    with pytest.raises(RowRejectedError, match=r"message 1 \(system\): TemplateError: no system role"):
        tokenizer_of(files, kind).learned(ChatRow(messages=CONVERSATION, tools=None))


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"turns": "some"}, "--turns"),
        ({"loss_mask": "tag"}, "--loss-mask"),
        ({"loss_mask": "tags", "turns": "each"}, "--turns all"),
        ({"date": "1 May"}, "--date"),
        ({"template_args": {"messages": 1}}, "--template-arg"),
    ],
)
def test_settings_that_are_none_are_refused(settings: dict[str, Any], found: str) -> None:
    with pytest.raises(InputError, match=re.escape(found)):
        ChatSettings(**settings)


def test_template_args_are_json_or_text() -> None:
    pairs = ["enable_thinking=false", "n=3", "date_string=26 Jul 2024", 'kind={"a": 1}', "empty=", "eq=a=b"]
    found = {"enable_thinking": False, "n": 3, "date_string": "26 Jul 2024", "kind": {"a": 1}, "empty": "", "eq": "a=b"}
    assert parse_template_args(pairs) == found
    for wrong in (["x"], ["=1"], ["a b=1"], ["a=1", "a=2"]):
        with pytest.raises(InputError, match="--template-arg"):
            parse_template_args(wrong)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_tokens_under_loss_are_those_of_the_answers(files: TokenizerFiles, kind: TemplateKind) -> None:
    ours = tokenizer_of(files, kind)
    row = ours.learned(conversation(kind))
    for (ids, mask), text in zip(ours.encode(row.texts), row.texts, strict=True):
        assert ids.dtype == np.uint32
        assert 0 < mask.sum() < len(mask)
        assert len(ids) == len(mask)
        assert len(text.spans) >= 1
