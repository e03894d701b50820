"""Two checks on the first conversations: text against the tokenizer's own template, ids against transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from draftcache.capture.prepare.chat.chat_tokens import ChatTokenizer, render_chat, without_nones
from draftcache.capture.prepare.chat.tokenizer_files import ChatTemplate, TokenizerFiles
from draftcache.capture.prepare.rows.forms import ChatRow
from draftcache.capture.prepare.rows.rejections import RowRejectedError
from draftcache.store.common.errors import InputError

_CONTEXT = 40  # characters shown before a difference

Sample = tuple[str, int, ChatRow]  # file, line, row


def first_template_difference(
    given: ChatTemplate, own: ChatTemplate, rows: Sequence[Sample], variables: dict[str, str]
) -> str | None:
    """A text that says where the two templates first render different text; None where they agree on every row.

    A row that both templates refuse is no difference; a row that only one of them refuses is one.
    """
    for file, line, row in rows:
        mine, theirs = (_text_or_refusal(template, row, variables) for template in (given, own))
        if mine is None and theirs is None:
            continue
        if mine is None or theirs is None:
            refuser, other = (given, own) if mine is None else (own, given)
            return f"{file}:{line}: {refuser.source} refuses the conversation that {other.source} renders"
        if mine != theirs:
            shorter = min(len(mine), len(theirs))
            at = next((i for i in range(shorter) if mine[i] != theirs[i]), shorter)
            window = slice(max(0, at - _CONTEXT), at + _CONTEXT)
            return (
                f"{file}:{line}: at character {at} expected (the tokenizer's own template) {theirs[window]!r}, "
                f"found ({given.source}) {mine[window]!r}"
            )
    return None


def check_against_transformers(
    files: TokenizerFiles, template: ChatTemplate, tokenizer: Any, rows: Sequence[Sample]
) -> None:
    """Encode `rows` by ChatTokenizer and by `tokenizer.apply_chat_template`. Raises InputError where ids differ.

    They differ where a tokenizer class changes text or ids outside of its `tokenizers` backend.
    """
    ours = ChatTokenizer(files, template)
    for file, line, row in rows:
        try:
            chat = ours.render(row)
        except RowRejectedError:
            continue
        found = ours.encode([chat])[0][0].tolist()
        expected = tokenizer.apply_chat_template(
            without_nones(row.messages),
            tools=row.tools,
            chat_template=template.text(row.tools),
            tokenize=True,
            return_dict=True,
        )["input_ids"]
        if found != list(expected):
            raise InputError(
                f"{file}:{line}: expected the {len(expected)} ids of transformers' apply_chat_template, found "
                f"{len(found)} others: {type(tokenizer).__name__} does more than its tokenizer.json says. "
                "Tokenise with it yourself and give rows of token_ids and loss_mask"
            )


def _text_or_refusal(template: ChatTemplate, row: ChatRow, variables: dict[str, str]) -> str | None:
    try:
        return render_chat(template, row, variables, spans=False).text
    except RowRejectedError:
        return None
