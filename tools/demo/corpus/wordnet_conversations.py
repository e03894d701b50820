"""Conversations that ask for the meaning of words, from WordNet 3.0's data files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from draftcache.tools.demo.corpus.conversation import Conversation, make, rng_for

__all__ = ["wordnet_conversations"]

_PARTS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
_BLOCK = 40
"""Words that are neighbours in WordNet's order are related, so a block of 40 is held out as a whole."""
_FIRST = (
    "Define {words}.",
    "What does {words} mean?",
    "What is the meaning of {words}?",
    "Explain the word {words}.",
    "Can you define {words} for me?",
    "Give me a dictionary entry for {words}.",
)
_NEXT = ("And {words}?", "What about {words}?", "Now define {words}.", "How about {words}?", "Next: {words}.")


@dataclass(frozen=True)
class _Synset:
    part: str
    words: tuple[str, ...]
    gloss: str
    parent: tuple[str, str] | None
    opposites: tuple[tuple[str, str], ...]


def wordnet_conversations(directory: Path) -> Iterator[Conversation]:
    """Yield every synset once, under its first word. Two to five neighbouring words make one conversation."""
    for part, label in _PARTS.items():
        synsets = _read(directory / f"data.{part}", part)
        groups: dict[str, list[_Synset]] = {}
        for synset in synsets.values():
            groups.setdefault(synset.words[0], []).append(synset)
        names = list(groups)
        for block_start in range(0, len(names), _BLOCK):
            item = f"words/{part}/{block_start // _BLOCK}"
            block = names[block_start : block_start + _BLOCK]
            rng = rng_for(item)
            while block:
                count = rng.randint(2, 5)
                turns: list[str] = []
                for word in block[:count]:
                    question = rng.choice(_NEXT if turns else _FIRST)
                    quoted = f'"{word}"' if rng.random() < 0.4 else word
                    turns += [question.format(words=quoted), _entry(word, label, groups[word], synsets)]
                yield make("words", item, block[0], turns)
                block = block[count:]


def _entry(word: str, label: str, senses: list[_Synset], synsets: dict[tuple[str, str], _Synset]) -> str:
    lines = []
    for number, sense in enumerate(senses[:6], start=1):
        head = f"{number}. " if len(senses) > 1 else ""
        gloss, *examples = sense.gloss.split('; "')
        text = f"{head}{gloss[:1].upper()}{gloss[1:]}."
        if examples:
            text += " For example: " + "; ".join('"' + example.rstrip() for example in examples[:2]) + "."
        if len(sense.words) > 1:
            text += f" Also called: {', '.join(sense.words[1:6])}."
        if sense.parent in synsets:
            verb = "To " + word + " is a way to" if label == "verb" else "It is a kind of"
            text += f" {verb} {synsets[sense.parent].words[0]}."
        opposites = [synsets[key].words[0] for key in sense.opposites if key in synsets]
        if opposites:
            text += f" The opposite is {opposites[0]}."
        lines.append(text)
    return f"{word} ({label}): " + ("\n" + "\n".join(lines) if len(lines) > 1 else lines[0])


def _read(path: Path, part: str) -> dict[tuple[str, str], _Synset]:
    """Parse one data file (its format is in WordNet's wndb manual page) into synsets by (part's letter, offset)."""
    letter = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}[part]
    synsets: dict[tuple[str, str], _Synset] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("  ") or " | " not in line:
            continue
        data, gloss = line.split(" | ", 1)
        fields = data.split()
        count = int(fields[3], 16)
        words = tuple(fields[4 + 2 * i].split("(")[0].replace("_", " ") for i in range(count))
        pointers = fields[5 + 2 * count :]
        links = [(pointers[i], (letter, pointers[i + 1])) for i in range(0, 4 * int(fields[4 + 2 * count]), 4)]
        synsets[letter, fields[0]] = _Synset(
            part=part,
            words=words,
            gloss=gloss.strip(),
            parent=next((key for kind, key in links if kind in ("@", "@i")), None),
            opposites=tuple(key for kind, key in links if kind == "!"),
        )
    return synsets
