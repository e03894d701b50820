"""Checks of a job's template: its text against the tokenizer's own template's, its ids against transformers'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from draftcache.capture.prepare.chat.encoding import ChatTokenizer
from draftcache.capture.prepare.chat.learned_rows import LearnedText
from draftcache.capture.prepare.chat.rendering import Renderer
from draftcache.capture.prepare.rows.forms import ChatRow
from draftcache.capture.prepare.rows.rejections import RowRejectedError
from draftcache.store.common.errors import InputError

_CONTEXT = 40  # characters shown before a difference

Sample = tuple[str, int, ChatRow]  # file, line, row


def template_difference(given: Renderer, own: Renderer, row: ChatRow) -> str | None:
    """Say where two templates render different text of a row; None where they render the same.

    A row that both templates refuse is no difference; a row that only one of them refuses is one.
    """
    mine, theirs = (_text_or_refusal(renderer, row) for renderer in (given, own))
    if mine is None and theirs is None:
        return None
    if mine is None or theirs is None:
        refuser, other = (given, own) if mine is None else (own, given)
        return f"{refuser.template.source} refuses the conversation that {other.template.source} renders"
    if mine == theirs:
        return None
    shorter = min(len(mine), len(theirs))
    at = next((i for i in range(shorter) if mine[i] != theirs[i]), shorter)
    window = slice(max(0, at - _CONTEXT), at + _CONTEXT)
    return (
        f"at character {at} expected (the tokenizer's own template) {theirs[window]!r}, found "
        f"({given.template.source}) {mine[window]!r}"
    )


def check_against_transformers(
    ours: ChatTokenizer, tokenizer: Any, rows: Sequence[Sample], *, generation_prompt: bool = False
) -> None:
    """Encode `rows` by ChatTokenizer and by `tokenizer.apply_chat_template`. Raises InputError where ids differ.

    Both texts end with the `generation_prompt` on request. Ids differ where a tokenizer class changes text or ids
    outside of its `tokenizers` backend.
    """
    template = ours.renderer.template
    for file, line, row in rows:
        try:
            row = ours.conversations.normalised(row)
            text = ours.renderer.render(row.messages, row.tools, generation_prompt=generation_prompt)
        except RowRejectedError:
            continue
        found = ours.encode([LearnedText(text=text, spans=[])])[0][0].tolist()
        if ours.renderer.reads_date:  # transformers takes no other date than today's
            expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            expected = tokenizer.apply_chat_template(
                row.messages,
                tools=row.tools,
                chat_template=template.text(row.tools),
                add_generation_prompt=generation_prompt,
                tokenize=True,
                return_dict=True,
                **ours.settings.template_args,
            )["input_ids"]
        if found != list(expected):
            raise InputError(
                f"{file}:{line}: expected the {len(expected)} ids of transformers' apply_chat_template, found "
                f"{len(found)} others: {type(tokenizer).__name__} does more than its tokenizer.json says. "
                "Tokenise with it yourself and give rows of token_ids and loss_mask"
            )


def _text_or_refusal(renderer: Renderer, row: ChatRow) -> str | None:
    try:
        return renderer.render(row.messages, row.tools)
    except RowRejectedError:
        return None
