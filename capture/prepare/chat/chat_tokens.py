"""Conversations -> token ids and exact assistant masks, as `apply_chat_template` gives them, in batches.

transformers renders the text (by its own Jinja environment, whose `{% generation %}` extension reports character
spans), and `tokenizers` encodes a batch of texts. The spans become token ranges by bisection over the encoding's
offsets: 2 x log2(tokens) look-ups per span, where transformers scans the encoding and fills the mask in Python.

A token is the assistant's if it overlaps a span. The masks equal transformers' masks except where transformers cuts
them short. Where a span's last character is several tokens (an emoji, with the end-of-turn token outside of the block),
all of them are in the mask here, and only the first one in transformers'. Where a span's first character belongs to no
token (a normaliser dropped it, or a ByteLevel post-processor trims offsets), transformers loses the mask of the row,
and here it is kept.
"""

from __future__ import annotations

import bisect
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

import numpy as np

from draftcache.capture.prepare.chat.tokenizer_files import ChatTemplate, TokenizerFiles
from draftcache.capture.prepare.rows.forms import ChatRow
from draftcache.capture.prepare.rows.rejections import RowRejectedError, clip
from draftcache.store.common.errors import InputError

Span = tuple[int, int]  # characters, end exclusive


@dataclass(frozen=True, kw_only=True)
class RenderedChat:
    """A conversation as text, with the spans of characters that the assistant wrote."""

    text: str
    assistant_spans: list[Span]


ROW_SECONDS = 20.0
"""Computing time after which the rendering of one row is given up: a template is a program, and may never end."""


class ChatTokenizer:
    """Renders and encodes rows with one tokenizer and one template; every process builds its own."""

    def __init__(self, files: TokenizerFiles, template: ChatTemplate) -> None:
        from tokenizers import Tokenizer

        self.template = template
        self.variables = files.special_tokens
        self._backend = Tokenizer.from_str(files.backend_json)
        self._backend.encode_special_tokens = files.encode_special_tokens
        # tokenizer.json may set truncation and padding; transformers resets both on every call.
        self._backend.no_truncation()
        self._backend.no_padding()

    def render(self, row: ChatRow) -> RenderedChat:
        """Render one row. Raises RowRejectedError where the template refuses it."""
        return render_chat(self.template, row, self.variables)

    def encode(self, chats: Sequence[RenderedChat]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Encode texts, adding no special tokens. Returns (ids uint32 [T], assistant mask bool [T]) of each."""
        encodings = self._backend.encode_batch([chat.text for chat in chats], add_special_tokens=False)
        return [
            (np.array(encoding.ids, dtype=np.uint32), _assistant_mask(encoding, chat.assistant_spans))
            for encoding, chat in zip(encodings, chats, strict=True)
        ]


def render_chat(template: ChatTemplate, row: ChatRow, variables: dict[str, str], *, spans: bool = True) -> RenderedChat:
    """Render with transformers' Jinja environment, without a generation prompt.

    `spans=False` leaves the spans out, for a template without generation tags. Raises RowRejectedError where the
    template refuses the row, or its text holds what UTF-8 can't encode.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        with _cpu_time_limit(ROW_SECONDS):
            texts, found = render_jinja_template(
                conversations=[without_nones(row.messages)],
                tools=row.tools,
                chat_template=template.text(row.tools),
                return_assistant_tokens_mask=spans,
                **variables,
            )
    except Exception as exc:  # a template is a program, and any exception of it concerns this row
        raise RowRejectedError(
            "template-rejected",
            expected="a conversation that the chat template renders",
            found=f"{type(exc).__name__}: {clip(str(exc))}",
        ) from exc
    text = texts[0]
    if not text.isascii() and (surrogate := _lone_surrogate(text)):
        raise RowRejectedError("lone-surrogate", expected="text that UTF-8 can hold", found=surrogate)
    return RenderedChat(text=text, assistant_spans=found[0] if spans else [])


@contextmanager
def _cpu_time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block once this process has computed for `seconds` in it.

    The time of other processes and of a suspended machine does not count. Signals reach the main thread only, so there
    is no limit in another thread, where nothing but a caller's own code can be.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(_number: int, _frame: FrameType | None) -> NoReturn:
        raise TimeoutError(f"rendering takes more than {seconds:g} s of computing")

    before = signal.signal(signal.SIGVTALRM, over)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def without_nones(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages without the keys whose value is None. transformers 5.23 drops them too; 5.17 leaves it to the caller."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


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
def one_thread_per_process() -> Iterator[None]:
    """Keep `tokenizers` from starting a thread per core, since prepare runs one process per core."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _assistant_mask(encoding: Any, spans: Sequence[Span]) -> np.ndarray:
    tokens = len(encoding)
    mask = np.zeros(tokens, np.bool_)
    positions = range(tokens)
    for start, end in spans:
        if start < end:
            first = bisect.bisect_right(positions, start, key=lambda i: encoding.token_to_chars(i)[1])
            last = bisect.bisect_left(positions, end, key=lambda i: encoding.token_to_chars(i)[0])
            mask[first:last] = True
    return mask


def _lone_surrogate(text: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as exc:
        return f"U+{ord(text[exc.start]):04X} at character {exc.start} of the rendered text"
    return ""
