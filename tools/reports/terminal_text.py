"""Text that somebody else wrote, made safe to print: no character of it drives the terminal or hides another."""

from __future__ import annotations

import os
import unicodedata
from typing import TextIO

_JOINERS = "\u200c\u200d"  # of scripts and emoji; the other format characters (bidirectional ones too) are escaped


def visible(text: str, also: str = "") -> str:
    """Return the text with control, format and separator characters as Python's escapes, but newline, tab and joiners.

    The characters of `also` are escaped too.
    """
    return "".join(_escaped(char) if char in also or _is_hidden(char) else char for char in text)


def on_one_line(text: str) -> str:
    """Return the text, such as a file's name, with newlines and tabs escaped too."""
    return visible(text, also="\n\t")


def quoted(text: str, width: int = 14) -> str:
    """Return the text in quotes and on one line, all that isn't printable escaped, cut to `width` characters."""
    escaped = "".join(char if char.isprintable() else _escaped(char) for char in text)
    return f"'{escaped if len(escaped) <= width else escaped[: width - 1] + '…'}'"


def shows_colour(stream: TextIO) -> bool:
    """Return whether the stream is a terminal that shows colour, and NO_COLOR (https://no-color.org) is not set."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _is_hidden(char: str) -> bool:
    if char in "\n\t" or char in _JOINERS or char.isprintable():
        return False
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode()
