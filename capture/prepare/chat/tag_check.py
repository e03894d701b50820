"""Compares a template's generation tags with the answers that the generation prompt tells: tags are often wrong."""

from __future__ import annotations

from draftcache.capture.prepare.chat.answers import Answer
from draftcache.capture.prepare.chat.rendering import Renderer
from draftcache.capture.prepare.notes import Notes
from draftcache.capture.prepare.rows.forms import ChatRow
from draftcache.capture.prepare.rows.rejections import clip

_SHOWN = 24  # characters of a difference, which is part of its kind


def compare_tags(renderer: Renderer, row: ChatRow, answers: list[Answer], notes: Notes) -> None:
    """Note for each answer what the template's tags mark too much or too little of it, by kind."""
    for answer in answers:
        if answer.joined:
            continue
        text, spans = renderer.render_tagged(row.messages[: answer.message + 1], row.tools)
        last = next((span for span in reversed(spans) if span[0] < answer.end and span[1] > answer.start), None)
        example = clip(text[answer.start : answer.end])
        if last is None:
            notes.add("generation tags mark nothing of an answer", example)
            continue
        start, end = last
        for kind, difference in (
            ("add before an answer", text[start : answer.start]),
            ("leave out at an answer's begin", text[answer.start : start]),
            ("add behind an answer", text[answer.end : end]),
            ("leave out at an answer's end", text[end : answer.end]),
        ):
            if difference:
                notes.add(f"generation tags {kind}: {difference[:_SHOWN]!r}", example)
