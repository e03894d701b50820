"""Conversations as text, by a chat template in transformers' Jinja environment, as serving engines render them."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from types import FrameType
from typing import Any, NoReturn

from draftcache.capture.prepare.chat.tokenizer_files import ChatTemplate
from draftcache.capture.prepare.rows.rejections import RowRejectedError, clip
from draftcache.store.common.errors import InputError

Message = dict[str, Any]
Tools = list[dict[str, Any]] | None
Span = tuple[int, int]  # characters, end exclusive

ROW_SECONDS = 20.0
"""Computing time after which the work on one row is given up: a template is a program, and may never end."""
DEFAULT_DATE = "2026-01-01"
"""The date that templates get for today's. It is pinned, so that the same job gives the same text on any day."""
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Renderer:
    """Renders messages by one template, with its variables and a pinned date."""

    def __init__(self, template: ChatTemplate, variables: Mapping[str, Any], today: str = DEFAULT_DATE) -> None:
        """`variables` are what the template reads besides messages and tools: special tokens, template arguments."""
        self.template = template
        self.variables = dict(variables)
        self.reads_date = False
        """Whether any rendering so far asked for today's date."""
        self._today = date.fromisoformat(today)

    def has_tags(self, tools: Tools = None) -> bool:
        """Whether the template marks by `{% generation %}` what the assistant writes."""
        return bool(_GENERATION_TAG.search(self.template.text(tools)))

    def render(self, messages: list[Message], tools: Tools, *, generation_prompt: bool = False) -> str:
        """Return the text. Raises RowRejectedError where the template refuses, or UTF-8 can't hold its text."""
        from transformers.utils.chat_template_utils import _compile_jinja_template

        try:
            text: str = _compile_jinja_template(self.template.text(tools)).render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=generation_prompt,
                strftime_now=self._strftime,
                **self.variables,
            )
        except Exception as exc:  # a template is a program, and any exception of it concerns this row
            raise _refusal(exc) from exc
        return _checked(text)

    def render_tagged(self, messages: list[Message], tools: Tools) -> tuple[str, list[Span]]:
        """Return the text and the spans that the template's generation tags mark. Raises RowRejectedError."""
        from transformers.utils.chat_template_utils import render_jinja_template

        with _own_strftime(self.template.text(tools), self._strftime):
            try:
                texts, spans = render_jinja_template(
                    conversations=[messages],
                    tools=tools,
                    chat_template=self.template.text(tools),
                    return_assistant_tokens_mask=True,
                    **self.variables,
                )
            except Exception as exc:
                raise _refusal(exc) from exc
        return _checked(texts[0]), [(first, last) for first, last in spans[0]]

    def first_refused(self, messages: list[Message], tools: Tools) -> str:
        """Say which message the template refuses: the last of the shortest beginning that it refuses."""
        for count in range(1, len(messages) + 1):
            try:
                self.render(messages[:count], tools)
            except RowRejectedError:
                return f"message {count} ({messages[count - 1].get('role')})"
        return "the whole"

    def _strftime(self, form: str) -> str:
        self.reads_date = True
        return self._today.strftime(form)


@contextmanager
def row_time_limit() -> Iterator[None]:
    """Raise TimeoutError in the block once this process has computed for ROW_SECONDS in it.

    The time of other processes and of a suspended machine does not count. Signals reach the main thread only, so there
    is no limit in another thread, where nothing but a caller's own code can be.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(_number: int, _frame: FrameType | None) -> NoReturn:
        raise _OutOfTimeError

    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, ROW_SECONDS)
    try:
        yield
    except _OutOfTimeError:
        raise TimeoutError(f"rendering takes more than {ROW_SECONDS:g} s of computing") from None
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


class _OutOfTimeError(BaseException):
    """No Exception, so that it ends all work on a row, and is not taken for one of the template's own."""


def check_template_compiles(template: ChatTemplate) -> None:
    """Raise InputError where the template is not valid Jinja, since every row would be refused for it otherwise."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    for text in (template.plain, template.with_tools):
        try:
            _compile_jinja_template(text)
        except TemplateError as exc:
            where = f", line {exc.lineno}" if hasattr(exc, "lineno") else ""
            raise InputError(f"chat template ({template.source}{where}): expected Jinja, found: {exc}") from exc


@contextmanager
def _own_strftime(text: str, strftime: Any) -> Iterator[None]:
    """Have transformers' own rendering ask `strftime` for the date: it takes no functions as variables."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    values = _compile_jinja_template(text).globals
    before = values["strftime_now"]
    values["strftime_now"] = strftime
    try:
        yield
    finally:
        values["strftime_now"] = before


def _refusal(exc: Exception) -> RowRejectedError:
    return RowRejectedError(
        "template-rejected",
        expected="a conversation that the chat template renders",
        found=f"{type(exc).__name__}: {clip(str(exc))}",
    )


def _checked(text: str) -> str:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as exc:
            found = f"U+{ord(text[exc.start]):04X} at character {exc.start} of the rendered text"
            raise RowRejectedError("lone-surrogate", expected="text that UTF-8 can hold", found=found) from exc
    return text
