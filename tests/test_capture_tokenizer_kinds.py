"""The tokens under loss are exactly those of the answers, for every kind of tokenizer."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from draftcache.capture.prepare.chat.encoding import ChatTokenizer
from draftcache.capture.prepare.chat.learned_rows import LearnedText
from draftcache.capture.prepare.chat.tokenizer_files import ChatTemplate, TokenizerFiles
from draftcache.capture.prepare.rows.forms import ChatRow
from support.tokenizer_kinds import KINDS, train

CHATML = (
    "{%- for m in messages -%}{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
BRACKETS = (
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{{- '<s>[INST] ' ~ m.content ~ ' [/INST]' -}}{%- else -%}"
    "{{- ' ' ~ m.content ~ '</s>' -}}{%- endif -%}{%- endfor -%}"
)
THINKING = CHATML.replace("assistant\\n' -}}", "assistant\\n<think>\\n' -}}").replace(
    "~ m.content ~", "~ ('<think>\\n' if m.role == 'assistant' else '') ~ m.content ~"
)
TEMPLATES = {"chatml": CHATML, "brackets": BRACKETS, "thinking": THINKING}
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
    "\t",
    "x",
    "ß",
    "𝔘",
    "\x00",
    "\u2028",
]


@pytest.fixture(scope="module", params=list(KINDS))
def backend(request: pytest.FixtureRequest) -> Tokenizer:
    return train(request.param)


def tokenizer_of(backend: Tokenizer, template: str) -> ChatTokenizer:
    files = TokenizerFiles(
        directory="kind",
        files={},
        backend_json=backend.to_str(),
        special_tokens={},
        encode_special_tokens=False,
        stop_tokens=("<|im_end|>", "</s>"),
        own_template=None,
        vocab_size=backend.get_vocab_size(),
        vocab_size_from="tokenizer",
    )
    return ChatTokenizer(files, ChatTemplate(plain=template, with_tools=template, source="test"))


def random_row(choose: random.Random) -> ChatRow:
    contents = ["".join(choose.choices(PIECES, k=choose.randrange(1, 9))) for _ in range(2 * choose.randrange(1, 4))]
    roles = ("user", "assistant")
    messages: list[dict[str, Any]] = [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]
    return ChatRow(messages=messages, tools=None)


def by_prefixes(backend: Tokenizer, text: LearnedText) -> np.ndarray:
    """The mask by another way: a token carries loss unless all of its text is in a beginning that carries none.

    Beginnings are encoded by themselves: the ids that they share with the whole are outside of the span.
    """
    ids = backend.encode(text.text, add_special_tokens=False).ids
    mask = np.zeros(len(ids), np.bool_)
    for start, end in text.spans:
        before, upto = (_shared(backend, text.text[:border], ids) for border in (start, end))
        mask[before:upto] = True
    return mask


def _shared(backend: Tokenizer, beginning: str, ids: list[int]) -> int:
    own = backend.encode(beginning, add_special_tokens=False).ids
    return next((i for i, (a, b) in enumerate(zip(own, ids, strict=False)) if a != b), min(len(own), len(ids)))


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_masks_are_exact(backend: Tokenizer, template: str) -> None:
    ours, choose = tokenizer_of(backend, template), random.Random(3)
    for _ in range(60):
        row = random_row(choose)
        texts = ours.learned(row).texts
        for text, (ids, mask) in zip(texts, ours.encode(texts), strict=True):
            expected = by_prefixes(backend, text)
            assert mask.tolist() == expected.tolist(), (text, ids)
            runs = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8))).reshape(-1, 2)
            for (first, last), (start, end) in zip(runs, text.spans, strict=True):
                written = backend.decode(ids[first:last].tolist(), skip_special_tokens=False)
                assert written.strip() == text.text[start:end].strip()


def test_a_mask_that_is_off_by_one_would_be_seen(backend: Tokenizer) -> None:
    """Negative control."""
    ours = tokenizer_of(backend, CHATML)
    (text,) = ours.learned(random_row(random.Random(1))).texts
    ((_, mask),) = ours.encode([text])
    assert np.roll(mask, 1).tolist() != by_prefixes(backend, text).tolist()
    assert mask.tolist() == by_prefixes(backend, text).tolist()
