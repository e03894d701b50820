"""From a conversation to the texts that are learned from, with the spans of characters that carry loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from draftcache.capture.prepare.chat.answers import Answer, AnswerRule
from draftcache.capture.prepare.chat.content_check import vanished, vanished_tools
from draftcache.capture.prepare.chat.normalising import normalise
from draftcache.capture.prepare.chat.rendering import Renderer, Span, row_time_limit
from draftcache.capture.prepare.chat.settings import ChatSettings
from draftcache.capture.prepare.chat.tag_check import compare_tags
from draftcache.capture.prepare.chat.tokenizer_files import TokenizerFiles
from draftcache.capture.prepare.chat.traits import TemplateTraits, probe_template
from draftcache.capture.prepare.notes import Notes
from draftcache.capture.prepare.rows.forms import ChatRow
from draftcache.capture.prepare.rows.rejections import RowRejectedError, clip

REWRITTEN = "history rewritten: rows whose earlier answers the template renders otherwise than they were generated"


@dataclass(frozen=True, kw_only=True)
class LearnedText:
    """One text to be tokenised, with the spans of characters, end exclusive and ascending, that carry loss."""

    text: str
    spans: list[Span]


@dataclass(frozen=True, kw_only=True)
class LearnedRow:
    """What one conversation becomes: one text, or one per answer; and what was noticed about it."""

    texts: list[LearnedText]
    notes: Notes = field(default_factory=Notes)


class ConversationRenderer:
    """Turns conversations into learned texts, by one template and one job's settings."""

    def __init__(
        self,
        renderer: Renderer,
        files: TokenizerFiles,
        settings: ChatSettings,
        token_borders: Callable[[str], list[int]],
    ) -> None:
        self.traits: TemplateTraits = probe_template(renderer)
        self._renderer = renderer
        self._settings = settings
        self._rule = AnswerRule(renderer, files.stop_tokens, token_borders)

    def learned(self, row: ChatRow) -> LearnedRow:
        """Return what is learned from one conversation.

        Raises RowRejectedError where the template refuses it, where an answer is not found in the text, where the work
        takes too long, and, if the settings are strict, where text of a message is not in the rendered text.
        """
        row = normalise(row, self.traits, self._settings.system)
        try:
            with row_time_limit():
                return self._learned(row)
        except TimeoutError as exc:
            raise RowRejectedError(
                "template-takes-too-long", expected="a conversation that is rendered in time", found=str(exc)
            ) from exc

    def normalised(self, row: ChatRow) -> ChatRow:
        """Return the row as the template gets it."""
        return normalise(row, self.traits, self._settings.system)

    def _learned(self, row: ChatRow) -> LearnedRow:
        notes = Notes()
        try:
            whole = self._renderer.render(row.messages, row.tools)
            if self._settings.loss_mask == "tags":
                return self._by_tags(row, notes)
            answers = self._answers(row, whole, notes)
        except RowRejectedError as exc:
            if exc.reason != "template-rejected":
                raise
            refused = self._renderer.first_refused(row.messages, row.tools)
            raise RowRejectedError(exc.reason, expected=exc.expected, found=f"{refused}: {exc.found}") from exc
        texts = self._texts(row, whole, answers, notes)
        self._check_content(row, whole, answers, notes)
        if self._renderer.has_tags(row.tools):
            compare_tags(self._renderer, row, answers, notes)
        return LearnedRow(texts=texts, notes=notes)

    def _answers(self, row: ChatRow, whole: str, notes: Notes) -> list[Answer]:
        answers = []
        last = len(row.messages) - 1
        for index, message in enumerate(row.messages):
            if message.get("role") != "assistant" or index in row.unlearned:
                continue
            try:
                found = self._rule.answer(row.messages, row.tools, index, whole if index == last else None)
            except RowRejectedError:
                if index:
                    raise
                # Most templates refuse to be asked for an answer to nothing.
                notes.add("answers to nothing: a conversation's first message, without loss", clip(message["content"]))
                continue
            if found.joined:
                notes.add("answers put behind the prompt as it was served", clip(found.text[-80:]))
            answers.append(found)
        return answers

    def _texts(self, row: ChatRow, whole: str, answers: list[Answer], notes: Notes) -> list[LearnedText]:
        turns = self._settings.turns
        if not answers:
            return [LearnedText(text=whole, spans=[])]
        rewritten = [answer for answer in answers if not whole.startswith(answer.text[: answer.end])]
        if rewritten:
            notes.add(REWRITTEN, _example_of(rewritten[0]))
        if turns == "auto":
            turns = "each" if rewritten else "all"
        if turns == "last":
            if len(answers) > 1:
                example = clip(row.messages[answers[0].message]["content"])
                notes.add("answers without loss, by --turns last", example, len(answers) - 1)
            answers = answers[-1:]
        if turns != "all":
            if len(answers) > 1:
                notes.add("rows added: one per answer", f"{len(answers)} answers", len(answers) - 1)
            texts = [LearnedText(text=answer.text, spans=[(answer.start, answer.end)]) for answer in answers]
            endless = [answer for answer in answers if not answer.stops]
        else:
            spans = [self._span_in(row, whole, answer, rewritten, notes) for answer in answers]
            texts = [LearnedText(text=whole, spans=spans)]
            endless = [
                answer
                for answer, (_, end) in zip(answers, spans, strict=True)
                if not answer.stops and answer not in rewritten and end == answer.end
            ]
        if endless:
            example = clip(endless[0].text[-40:])
            notes.add("answers that end without a token that stops generation", example, len(endless))
        return texts

    def _span_in(self, row: ChatRow, whole: str, answer: Answer, rewritten: list[Answer], notes: Notes) -> Span:
        """Where the template renders an answer in the whole conversation, which may be otherwise than it was."""
        if answer not in rewritten:
            return answer.start, self._rule.end_in(whole, answer)
        notes.add("answers learned otherwise than they were generated, by --turns all", _example_of(answer))
        prompt, history = self._rule.prompt_and_history(row.messages, row.tools, answer.message)
        start = self._rule.start_in(prompt, history, whole)
        if start is None:
            raise RowRejectedError(
                "history-rewritten",
                expected=f"the text before message {answer.message + 1} as it was when it was generated; --turns each "
                "has a row per answer",
                found=_example_of(answer),
            )
        return start, self._rule.end_of(whole, start)[0]

    def _by_tags(self, row: ChatRow, notes: Notes) -> LearnedRow:
        whole, spans = self._renderer.render_tagged(row.messages, row.tools)
        if row.unlearned:
            assistant = [index for index, message in enumerate(row.messages) if message.get("role") == "assistant"]
            if len(assistant) != len(spans):
                raise RowRejectedError(
                    "weights-with-tags",
                    expected=f"a tagged block for each of {len(assistant)} assistant messages, of which some carry no "
                    "loss",
                    found=f"{len(spans)} blocks",
                )
            spans = [span for index, span in zip(assistant, spans, strict=True) if index not in row.unlearned]
        self._check_content(row, whole, [], notes)
        return LearnedRow(texts=[LearnedText(text=whole, spans=spans)], notes=notes)

    def _check_content(self, row: ChatRow, whole: str, answers: list[Answer], notes: Notes) -> None:
        """Count the messages of which text is not rendered, or, of an answer, is not under loss."""
        under_loss = {answer.message: answer.text[answer.start : answer.end] for answer in answers}
        found = [
            (f"{message['role']}'s {key}", message[key])
            for index, message in enumerate(row.messages)
            for key in vanished(message, under_loss.get(index, whole))
        ]
        found += [("tools", name) for name in vanished_tools(row.tools, whole)]
        if found and self._settings.strict:
            what, value = found[0]
            raise RowRejectedError(
                "text-vanished", expected="every text in what the template renders", found=f"{what}: {clip(value)}"
            )
        for what, value in found:
            notes.add(f"text not learned or not rendered: {what}", clip(value))


def _example_of(answer: Answer) -> str:
    beginning = answer.text[answer.start : answer.end]
    return f"message {answer.message + 1} was generated as {clip(beginning)!r}"
