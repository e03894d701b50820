"""Multi-turn conversations from plays: the speakers of a scene alternate as user and assistant."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from draftcache.tools.demo.corpus.conversation import Conversation, make, rng_for, take_paragraphs

__all__ = ["play_conversations"]

_SPEAKER = re.compile(r"^\*\*(.+?)\*\*\s*$")
_TARGET_CHARACTERS = 2200
_MAX_SPEECH = 1200
_OPENINGS = (
    "Let us read from {play}, {act}, {scene}.",
    "Play a scene with me: {play}, {act}, {scene}.",
    "{play}, {act}, {scene}. I begin.",
    "Continue this scene from {play} ({act}, {scene}).",
)


def play_conversations(directory: Path) -> Iterator[Conversation]:
    """Yield windows of about 2,200 characters (600 tokens) of consecutive speeches, each turn headed by its speaker."""
    for path in sorted(directory.glob("*/*.md")):
        title, scenes = _read_play(path.read_text(encoding="utf-8"))
        for act, scene, speeches in scenes:
            for number, turns in enumerate(_windows(speeches)):
                name = f"{act} {scene} {number}"
                opening = rng_for(path.stem, name).choice(_OPENINGS).format(play=title, act=act, scene=scene)
                yield make("plays", f"play/{path.stem}", name, (f"{opening}\n\n{turns[0]}", *turns[1:]))


def _read_play(text: str) -> tuple[str, list[tuple[str, str, list[str]]]]:
    """Return the title, and (act, scene, speeches) for each scene. Stage directions are left out."""
    title, act = "", ""
    scenes: list[tuple[str, str, list[str]]] = []
    speaker = ""
    lines: list[str] = []

    def close() -> None:
        speech = "\n".join(line for line in lines if line)
        if speaker and speech and scenes:
            shortened = take_paragraphs(speech, _MAX_SPEECH)[0]
            scenes[-1][2].append(f"{speaker.upper()}: {shortened}")

    for raw in text.splitlines():
        line = raw.strip()
        named = _SPEAKER.match(line)
        if line.startswith("#") or named:
            close()
            speaker, lines = (named.group(1) if named else ""), []
        if line.startswith("# "):
            title = title or line[2:]
        elif line.startswith("## "):
            act = line[3:].capitalize().replace("Act i", "Act I")
            act = "Act " + act.split()[-1].upper() if act.startswith("Act") else act
        elif line.startswith("### "):
            scenes.append((act, line[4:].split(".")[0].capitalize().replace("Scene ", "scene "), []))
        elif speaker and not named and not line.startswith("_"):
            lines.append(re.sub(r"_([^_]*)_", r"\1", line).replace("\\", ""))
    close()
    return title, [scene for scene in scenes if len(scene[2]) >= 2]


def _windows(speeches: list[str]) -> Iterator[list[str]]:
    """Split a scene into runs of an even number of turns.

    Whether a run begins at this speech or the next one is chosen so that the assistant's turns are the longer ones.
    """
    start = 0
    while start < len(speeches) - 1:
        odd = sum(map(len, speeches[start + 1 : start + 9 : 2]))
        even = sum(map(len, speeches[start + 2 : start + 10 : 2]))
        if even > odd and start + 2 < len(speeches):
            start += 1
        turns: list[str] = []
        while start + 1 < len(speeches) and (not turns or sum(map(len, turns)) < _TARGET_CHARACTERS):
            turns += speeches[start : start + 2]
            start += 2
        yield turns
