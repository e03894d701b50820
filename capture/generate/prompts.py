"""From rows to prompts, by the rows, roles, normalising and templates of prepare."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from draftcache.capture.generate.samples import Prompt
from draftcache.capture.prepare.chat.encoding import ChatTokenizer
from draftcache.capture.prepare.chat.learned_rows import LearnedText
from draftcache.capture.prepare.chat.rendering import Renderer, row_time_limit
from draftcache.capture.prepare.chat.settings import ChatSettings
from draftcache.capture.prepare.chat.template_check import check_against_transformers
from draftcache.capture.prepare.chat.tokenizer_files import ChatTemplate, TokenizerFiles
from draftcache.capture.prepare.rows.files import Row, read_rows
from draftcache.capture.prepare.rows.forms import ChatRow, parse_row
from draftcache.capture.prepare.rows.rejections import Rejection, RowRejectedError, clip
from draftcache.capture.prepare.rows.roles import RoleMap
from draftcache.capture.prepare.rows.token_rows import TokenRow

_ASKING = ("user", "tool")
_CHECKED_ROWS = 8  # of each file, whose ids are compared with transformers'


class PromptReader:
    """Makes prompts of rows with one tokenizer, one template and one rule of what is continued."""

    def __init__(
        self,
        files: TokenizerFiles,
        template: ChatTemplate,
        rendering: ChatSettings,
        *,
        roles: RoleMap,
        continue_from: str,
    ) -> None:
        """`continue_from` is one of `config.CONTINUATIONS`."""
        self.tokenizer = ChatTokenizer(files, template, rendering)
        self.vocab_size = files.vocab_size
        self._roles = roles
        self._continue_from = continue_from
        own = files.own_template
        variables = self.tokenizer.renderer.variables
        self._own = None if own in (None, template) else Renderer(own, variables, rendering.date)

    def prompts(self, file: str, line: int, row: Row) -> list[Prompt]:
        """Return the prompts of one row. Raises RowRejectedError where it has none, or the template refuses it."""
        parsed = parse_row(row, self._roles, answered=False)
        found = self._of_tokens(parsed) if isinstance(parsed, TokenRow) else self._of_messages(parsed)
        row_id = _row_id(row)
        return [replace(prompt, file=file, line=line, row_id=row_id) for prompt in found]

    def check(self, tokenizer: Any, path: Path) -> None:
        """Compare the first prompts of a file with transformers' own. Raises InputError where ids differ."""
        rows = [item for item in islice(read_rows(path), _CHECKED_ROWS) if not isinstance(item, Rejection)]
        checked = []
        for line, row in rows:
            try:
                parsed = parse_row(row, self._roles, answered=False)
                if isinstance(parsed, ChatRow):
                    ends = self._ends(parsed)
                    checked += [(str(path), line, replace(parsed, messages=parsed.messages[:end])) for end in ends]
            except RowRejectedError:
                continue
        check_against_transformers(self.tokenizer, tokenizer, checked[:_CHECKED_ROWS], generation_prompt=True)

    def _ends(self, row: ChatRow) -> list[int]:
        """Behind which messages an answer is asked for. Raises RowRejectedError where behind none."""
        asking = [message["role"] in _ASKING for message in row.messages]
        ends = [end for end in range(1, len(asking) + 1) if asking[end - 1] and not any(asking[end : end + 1])]
        if not ends:
            raise RowRejectedError(
                "no-prompt",
                expected="a message of the user or of a tool to answer",
                found=f"messages of {clip(sorted({str(message['role']) for message in row.messages}))}",
            )
        return self._chosen(ends)

    def _chosen(self, ends: list[int]) -> list[int]:
        return {"last-user": ends[-1:], "first-user": ends[:1], "each-user": ends}[self._continue_from]

    def _of_messages(self, row: ChatRow) -> Iterator[Prompt]:
        row = self.tokenizer.conversations.normalised(row)
        for turn, end in enumerate(self._ends(row)):
            text = self._rendered(row.messages[:end], row.tools)
            yield Prompt(
                token_ids=self.encode(text), text=text, messages=row.messages[:end], tools=row.tools,
                file="", line=0, row_id=None, turn=turn,
            )  # fmt: skip

    def _rendered(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> str:
        try:
            with row_time_limit():
                text = self.tokenizer.renderer.render(messages, tools, generation_prompt=True)
                own = text if self._own is None else self._own.render(messages, tools, generation_prompt=True)
        except TimeoutError as exc:
            raise RowRejectedError(
                "template-takes-too-long", expected="a conversation that is rendered in time", found=str(exc)
            ) from exc
        if own != text:
            raise RowRejectedError(
                "template-difference",
                expected=f"the text of the tokenizer's own template: {clip(own[-80:])}",
                found=clip(text[-80:]),
            )
        return text

    def _of_tokens(self, row: TokenRow) -> Iterator[Prompt]:
        """The ids before the answers of a row of token ids, or all ids where none carries loss."""
        ids: list[int] = row.token_ids.tolist()
        if max(ids) >= self.vocab_size:
            raise RowRejectedError(
                "token-id-out-of-vocabulary", expected=f"token ids below {self.vocab_size}", found=str(max(ids))
            )
        first = np.flatnonzero(np.diff(row.loss_mask.astype(np.int8), prepend=0) == 1).tolist()
        ends = self._chosen([end for end in first or [len(ids)] if end])
        if not ends:
            raise RowRejectedError("no-prompt", expected="token ids before the first that carries loss", found="none")
        for turn, end in enumerate(ends):
            yield Prompt(
                token_ids=ids[:end], text=self.tokenizer.decode(ids[:end]), messages=None, tools=None,
                file="", line=0, row_id=None, turn=turn,
            )  # fmt: skip

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, with no special tokens added."""
        ids: list[int] = self.tokenizer.encode([LearnedText(text=text, spans=[])])[0][0].tolist()
        return ids


def _row_id(row: Row) -> Any:
    """The row's own `id`, if it is text or a number."""
    values = json.loads(row) if isinstance(row, bytes) and b'"id"' in row else row  # it has been parsed before
    found = values.get("id") if isinstance(values, dict) else None
    return found if isinstance(found, str | int) else None
