"""Conversations -> token ids and exact loss masks, in batches.

`tokenizers` encodes a batch of texts, each once. The spans of characters that carry loss become token ranges by
bisection over the encoding's offsets: 2 x log2(tokens) look-ups per span.

A token carries loss if it overlaps a span. Where a span's last character is several tokens (an emoji), all of them do.
A token that begins in the prompt and ends in an answer, as no model would write it, does too.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import numpy as np

from draftcache.capture.prepare.chat.learned_rows import ConversationRenderer, LearnedRow, LearnedText
from draftcache.capture.prepare.chat.rendering import Renderer, Span
from draftcache.capture.prepare.chat.settings import ChatSettings
from draftcache.capture.prepare.chat.tokenizer_files import ChatTemplate, TokenizerFiles
from draftcache.capture.prepare.rows.forms import ChatRow


class ChatTokenizer:
    """Renders and encodes rows with one tokenizer and one template; every process builds its own."""

    def __init__(self, files: TokenizerFiles, template: ChatTemplate, settings: ChatSettings | None = None) -> None:
        from tokenizers import Tokenizer

        self.settings = settings or ChatSettings()
        self._backend = Tokenizer.from_str(files.backend_json)
        self._backend.encode_special_tokens = files.encode_special_tokens
        # tokenizer.json may set truncation and padding; transformers resets both on every call.
        self._backend.no_truncation()
        self._backend.no_padding()
        # Without special tokens to add, a post-processor does no more than trim blanks off the offsets.
        self._backend.post_processor = None
        variables = {**files.special_tokens, **self.settings.template_args}
        self.renderer = Renderer(template, variables, self.settings.date)
        self.conversations = ConversationRenderer(
            self.renderer, files, self.settings, lru_cache(maxsize=1024)(self._token_borders)
        )

    def learned(self, row: ChatRow) -> LearnedRow:
        """Return the texts that are learned from one row. Raises RowRejectedError, see `ConversationRenderer`."""
        return self.conversations.learned(row)

    def encode(self, texts: Sequence[LearnedText]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Encode texts, adding no special tokens. Returns (ids uint32 [T], loss mask bool [T]) of each."""
        encodings = self._backend.encode_batch([text.text for text in texts], add_special_tokens=False)
        return [
            (np.array(encoding.ids, dtype=np.uint32), _loss_mask(encoding, text.spans))
            for encoding, text in zip(encodings, texts, strict=True)
        ]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of these ids, special tokens included."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=False)
        return text

    def token_id(self, token: str) -> int | None:
        """Return the id of one token by its text; None where there is no such token."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def _token_borders(self, text: str) -> list[int]:
        return [first for first, _ in self._backend.encode(text, add_special_tokens=False).offsets]


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


def _loss_mask(encoding: Any, spans: Sequence[Span]) -> np.ndarray:
    tokens = len(encoding)
    mask = np.zeros(tokens, np.bool_)
    positions = range(tokens)
    for start, end in spans:
        if start < end:
            first = bisect.bisect_right(positions, start, key=lambda i: encoding.token_to_chars(i)[1])
            last = bisect.bisect_left(positions, end, key=lambda i: encoding.token_to_chars(i)[0])
            mask[first:last] = True
    return mask
