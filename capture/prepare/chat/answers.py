"""What the model would write: an answer is what a conversation's text has beyond the generation prompt before it.

For the assistant's message j, `prompt` is the rendering of messages[:j] with the generation prompt, which is what a
serving engine gives the model, and `text` is the rendering of messages[:j + 1] without one. The answer is what `text`
has beyond `prompt`, up to and including the first token at which generation stops. Generation tags are not needed.

Where `text` does not begin with `prompt` (the prompt opens the thinking, say, and the text holds none), the answer
begins where the two part, at a border of the prompt's tokens: what the generation prompt already holds is no answer.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from draftcache.capture.prepare.chat.rendering import Message, Renderer, Tools
from draftcache.capture.prepare.rows.rejections import RowRejectedError

_CONTEXT = 40  # characters shown around a difference


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer of the assistant, in the text of the conversation up to it."""

    message: int  # its index
    text: str  # the conversation up to this message and with it
    start: int  # characters of `text`
    end: int  # exclusive; behind the token at which generation stops
    stops: bool  # whether it ends with such a token
    joined: bool  # whether `text` had to be put together from prompt and answer


class AnswerRule:
    """Finds answers with one renderer and one tokenizer's end-of-generation tokens."""

    def __init__(
        self,
        renderer: Renderer,
        stop_tokens: Sequence[str],
        token_borders: Callable[[str], list[int]],
    ) -> None:
        """`stop_tokens` end generation; `token_borders(text)` returns the characters at which a text's tokens begin."""
        self._renderer = renderer
        self._stop = _any_of(stop_tokens)
        self._token_borders = token_borders

    def answer(self, messages: list[Message], tools: Tools, index: int, text: str | None = None) -> Answer:
        """Return the answer of message `index`. `text` is the rendering of messages[:index + 1], if it is known.

        Raises RowRejectedError where the template refuses, or where the two renderings part before the answer.
        """
        prompt = self._renderer.render(messages[:index], tools, generation_prompt=True)
        if text is None:
            text = self._renderer.render(messages[: index + 1], tools)
        start, joined = len(prompt), False
        if not text.startswith(prompt):
            start, text, joined = self._where_they_part(messages, tools, index, prompt, text)
        end, stops = self.end_of(text, start)
        return Answer(message=index, text=text, start=start, end=end, stops=stops, joined=joined)

    def end_of(self, text: str, start: int) -> tuple[int, bool]:
        """Return where the answer that begins at `start` ends, and whether a token that stops generation is its end.

        Without such a token the answer ends with the last character that is no blank.
        """
        if self._stop is not None and (match := self._stop.search(text, start)):
            return match.end(), True
        return max(start, len(text.rstrip())), False

    def end_in(self, whole: str, answer: Answer) -> int:
        """Return where an answer ends in a text that continues it, with the token behind it if that stops generation.

        Some models end their turn by writing the token that opens the user's.
        """
        if not answer.stops and self._stop is not None and (match := self._stop.match(whole, answer.end)):
            return match.end()
        return answer.end

    def start_in(self, prompt: str, history: str, text: str) -> int | None:
        """Return where an answer begins in a `text` that continues `history`; None where it does not continue it.

        `prompt` is `history` with the generation prompt.
        """
        common = _common(prompt, text)
        if common == len(prompt):
            return common
        before = _common(prompt, history)
        if common < before:
            return None
        borders = [border for border in self._token_borders(prompt[before:]) if before + border <= common]
        return before + max(borders, default=0)

    def prompt_and_history(self, messages: list[Message], tools: Tools, index: int) -> tuple[str, str]:
        """Return the renderings of messages[:index] with and without the generation prompt."""
        prompt = self._renderer.render(messages[:index], tools, generation_prompt=True)
        return prompt, self._renderer.render(messages[:index], tools) if index else ""

    def _where_they_part(
        self, messages: list[Message], tools: Tools, index: int, prompt: str, text: str
    ) -> tuple[int, str, bool]:
        history = self._renderer.render(messages[:index], tools) if index else ""
        start = self.start_in(prompt, history, text)
        if start is not None:
            return start, text, False
        # The text renders the history otherwise than the prompt, as where a template treats the last message its own
        # way. What is served is the prompt, and the answer is what follows the generation prompt in the text.
        opening, common = prompt[_common(prompt, history) :], _common(prompt, text)
        if opening and text.count(opening, common) == prompt.count(opening, common):
            return len(prompt), prompt + text[text.rindex(opening) + len(opening) :], True
        raise RowRejectedError(
            "no-answer-found",
            expected=f"message {index + 1} (assistant) to be rendered behind the generation prompt, which has "
            f"{_around(prompt, common)!r} at character {common}",
            found=repr(_around(text, common)),
        )


def _common(a: str, b: str) -> int:
    """The length of the longest common beginning, by bisection: comparing slices is fast, a loop over texts is not."""
    return bisect.bisect_left(range(1, min(len(a), len(b)) + 1), True, key=lambda length: a[:length] != b[:length])


def _around(text: str, at: int) -> str:
    return text[max(0, at - _CONTEXT) : at + _CONTEXT]


def _any_of(tokens: Sequence[str]) -> re.Pattern[str] | None:
    """A pattern of any of the texts, the longest first, so that a token is not taken for the beginning of another."""
    texts = sorted({token for token in tokens if token}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts))) if texts else None
