"""The demo's unit of text: one conversation, its source item, and the split that the item belongs to."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Conversation", "drop_near_duplicates", "make", "rng_for", "split_of", "take_paragraphs"]

_WORD = re.compile(r"\w+")
_SHINGLE_WORDS = 8


@dataclass(frozen=True)
class Conversation:
    """Alternating turns, with the user's first, and their source."""

    id: str
    source: str
    item: str
    """What is held out together: a module (its pages, docstrings and functions), a play, or a block of words."""
    turns: tuple[str, ...]

    def row(self) -> dict[str, object]:
        """Return the conversation in OpenAI's `messages` form, with `id` and `source`."""
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(self.turns)]
        return {"id": self.id, "source": self.source, "messages": messages}

    @property
    def characters(self) -> int:
        """Number of characters in all turns."""
        return sum(map(len, self.turns))


def make(source: str, item: str, name: str, turns: Iterable[str]) -> Conversation:
    """Return a conversation whose id is its source and a hash of its item, name and text."""
    kept = tuple(text.strip() for text in turns)
    digest = hashlib.sha256("\0".join((item, name, *kept)).encode()).hexdigest()[:16]
    return Conversation(id=f"{source}-{digest}", source=source, item=item, turns=kept)


def rng_for(*key: str) -> random.Random:
    """Return a generator seeded by a text key, so that one item's wording never depends on another item."""
    return random.Random(int.from_bytes(hashlib.sha256("\0".join(key).encode()).digest()[:8], "big"))


def split_of(item: str, val_share: float) -> str:
    """Return `train` or `val`, from a hash of the source item alone."""
    value = int.from_bytes(hashlib.sha256(f"split3\0{item}".encode()).digest()[:8], "big") / 2**64
    return "val" if value < val_share else "train"


def take_paragraphs(text: str, limit: int) -> list[str]:
    """Group whole paragraphs into pieces of about `limit` characters; a longer paragraph is cut at a line end."""
    pieces: list[str] = []
    current = ""
    for paragraph in text.split("\n\n"):
        for part in _cut_lines(paragraph, limit):
            if current and len(current) + len(part) > limit:
                pieces.append(current)
                current = part
            else:
                current = f"{current}\n\n{part}" if current else part
    if current:
        pieces.append(current)
    return [piece.strip("\n") for piece in pieces if piece.strip()]


def _cut_lines(paragraph: str, limit: int) -> list[str]:
    parts: list[str] = []
    current = ""
    for line in paragraph.split("\n"):
        if current and len(current) + len(line) > limit:
            parts.append(current)
            current = line
        else:
            current = f"{current}\n{line}" if current else line
    return [*parts, current]


def _shingles(conversation: Conversation) -> set[int]:
    words = _WORD.findall(" ".join(conversation.turns[1::2]).lower())
    count = max(1, len(words) - _SHINGLE_WORDS + 1)
    return {hash(tuple(words[i : i + _SHINGLE_WORDS])) for i in range(count)}


def drop_near_duplicates(
    val: list[Conversation], train: Iterable[Conversation], limit: float = 0.1
) -> list[Conversation]:
    """Return the held-out conversations with at most a share `limit` of their answers' 8-word shingles in `train`."""
    wanted = [_shingles(conversation) for conversation in val]
    universe = set().union(*wanted) if wanted else set()
    seen: set[int] = set()
    for conversation in train:
        seen |= _shingles(conversation) & universe
    return [c for c, shingles in zip(val, wanted, strict=True) if len(shingles & seen) <= limit * len(shingles)]
