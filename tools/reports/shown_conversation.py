"""One conversation of token ids as text, in which the tokens that carry loss are marked.

Tokens are decoded a few at a time, beside those before them, since a decoder may drop the space that a text begins
with, and since a character may take several tokens. Where a loss run begins or ends inside a character, each side
decodes to U+FFFD, the replacement character.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from draftcache.capture.prepare.statistics import loss_runs
from draftcache.capture.prepare.token_dataset import PreparedRow
from draftcache.store.common.errors import InputError
from draftcache.tools.reports.terminal_text import on_one_line, quoted, shows_colour, visible

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_OPEN, _CLOSE = "⟦", "⟧"
_ON, _OFF, _RETURN = "\x1b[1;32m", "\x1b[0m", "⏎"
_REPLACEMENT = "\ufffd"
_MOST_TOKENS = 8  # of a character: four bytes, and room for tokens that are no bytes. What is longer is no UTF-8
_MOST_RUNS = 32  # named in the header

Piece = tuple[int, int, str]
"""First token, the one behind the last, and the text that these tokens decode to together."""


def describe_shown(shown: PreparedRow, number: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return what `format_described` prints of conversation `number` of its split, as JSON values.

    `loss_runs` are [first token, one behind the last]; `text` is a list of `first`, `last` (one behind), `loss` and
    `text`, or None without a tokenizer. The text is as decoded, with nothing escaped.
    """
    starts, ends = loss_runs(shown.loss_mask, np.array([len(shown.loss_mask)]))
    return {
        "split": shown.split,
        "conversation": number,
        "file": shown.file,
        "line": shown.line,
        "tokens": len(shown.token_ids),
        "untruncated_tokens": shown.untruncated_tokens,
        "loss_tokens": int(shown.loss_mask.sum()),
        "loss_runs": [list(run) for run in zip(starts.tolist(), ends.tolist(), strict=True)],
        "text": None if tokenizer is None else _segments(shown.token_ids.tolist(), shown.loss_mask.tolist(), tokenizer),
    }


def token_table(
    shown: PreparedRow, first: int, last: int, tokenizer: Tokenizer | None
) -> list[dict[str, int | bool | str | None]]:
    """Return `position`, `token_id`, `text` (None without a tokenizer) and `loss` of the tokens `first` .. `last` - 1.

    The text of a part of a character is U+FFFD. Raises InputError for other numbers than 0 <= first < last <= T.
    """
    length = len(shown.token_ids)
    if not 0 <= first < last <= length:
        raise InputError(
            f"--rows: expected A,B with 0 <= A < B <= {length}, the tokens of {shown.file}:{shown.line}, "
            f"found {first},{last}"
        )
    ids, mask = shown.token_ids[:last].tolist(), shown.loss_mask[:last].tolist()
    texts: list[str | None] = [None] * last
    if tokenizer is not None:
        for start, end, text in decode_pieces(ids, tokenizer):
            alone = [text] if end - start == 1 else [_decode(ids[at : at + 1], tokenizer) for at in range(start, end)]
            texts[start:end] = alone
    return [{"position": at, "token_id": ids[at], "text": texts[at], "loss": mask[at]} for at in range(first, last)]


def decode_pieces(ids: list[int], tokenizer: Tokenizer) -> Iterator[Piece]:
    """Yield the shortest runs of tokens that decode to whole characters, in order; special tokens are shown.

    The texts together are what all tokens decode to. An id without a token is a piece of its own that says so.
    """
    context = first = 0
    for last in range(1, len(ids) + 1):
        if tokenizer.id_to_token(ids[last - 1]) is None:
            if first < last - 1:
                yield first, last - 1, _beside(ids, context, first, last - 1, tokenizer)
            yield last - 1, last, f"[no token: {ids[last - 1]}]"
            context = first = last
            continue
        text = _beside(ids, context, first, last, tokenizer)
        if text.endswith(_REPLACEMENT) and last - first < _MOST_TOKENS and last < len(ids):
            continue
        yield first, last, text
        context, first = first, last


def _beside(ids: list[int], context: int, first: int, last: int, tokenizer: Tokenizer) -> str:
    """Text of the tokens `first` .. `last` - 1 behind those from `context` on."""
    before, text = (_decode(ids[context:end], tokenizer) for end in (first, last))
    return text[len(before) :] if text.startswith(before) else _decode(ids[first:last], tokenizer)


def _decode(ids: list[int], tokenizer: Tokenizer) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False)) if ids else ""


def _segments(ids: list[int], mask: list[bool], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Return the text in runs of tokens that carry loss, and of those that don't."""
    segments: list[dict[str, Any]] = []
    for first, last, text in decode_pieces(ids, tokenizer):
        borders = [first, *(at for at in range(first + 1, last) if mask[at] != mask[at - 1]), last]
        for start, end in pairwise(borders):
            part = text if len(borders) == 2 else _decode(ids[start:end], tokenizer)
            if segments and segments[-1]["loss"] == mask[start]:
                segments[-1]["last"] = end
                segments[-1]["text"] += part
            else:
                segments.append({"first": start, "last": end, "loss": mask[start], "text": part})
    return segments


def format_described(found: dict[str, Any], *, colour: bool) -> str:
    """Format what `describe_shown` returns, and a `table` of `token_table` in the place of the text, if there is one.

    What carries loss is bold green, with ⏎ for its newlines, or without `colour` in ⟦ ⟧. These signs are escaped where
    the text itself has them, as control characters are.
    """
    if found.get("table") is not None:
        body = _format_table(found["table"])
    else:
        body = "".join(_format_segment(segment, colour=colour) for segment in found["text"] or [])
    return "\n".join([*_header(found), "", body])


def format_shown(shown: PreparedRow, number: int, tokenizer: Tokenizer, *, colour: bool) -> str:
    """Return conversation `number` of its split as text, headed by its origin, its tokens and its loss runs."""
    return format_described(describe_shown(shown, number, tokenizer), colour=colour)


def show_samples(
    samples: Iterable[tuple[str, str, int, np.ndarray, np.ndarray, int]], backend_json: str, stream: TextIO
) -> None:
    """Print samples of the splits to `stream`, numbered from 0 in each split, in colour where it is a terminal.

    A sample is (split, file, line, token ids uint32 [T], loss mask bool [T], tokens before truncation); `backend_json`
    is the tokenizer as `tokenizers` serialises it.
    """
    from tokenizers import Tokenizer

    tokenizer, numbers = Tokenizer.from_str(backend_json), Counter[str]()
    for sample in samples:
        shown = PreparedRow(*sample)
        print(
            format_shown(shown, numbers[shown.split], tokenizer, colour=shows_colour(stream)), end="\n\n", file=stream
        )
        numbers[shown.split] += 1
    stream.flush()


def load_backend(directory: Path) -> Tokenizer:
    """Load the tokenizer of a directory. Raises InputError where there is none that `tokenizers` can hold."""
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.is_file():
        raise InputError(f"--tokenizer {directory}: expected a directory with a tokenizer.json, found none")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as exc:  # `tokenizers` raises nothing narrower
        raise InputError(f"{path}: expected a tokenizer that `tokenizers` loads, found: {exc}") from exc


def _header(found: dict[str, Any]) -> list[str]:
    cut = found["untruncated_tokens"] - found["tokens"]
    runs = [f"{first} .. {last - 1}" for first, last in found["loss_runs"]]
    more = ["..."] if len(runs) > _MOST_RUNS else []
    return [
        f"conversation {found['conversation']} of {found['split']}, {on_one_line(found['file'])}:{found['line']}",
        f"tokens      {found['tokens']:,}"
        + (f", cut from {found['untruncated_tokens']:,}" if cut else " (nothing cut off)")
        + f"; {found['loss_tokens']:,} with loss",
        f"loss runs   {len(runs):,}: {', '.join([*runs[:_MOST_RUNS], *more])}",
    ]


def _format_segment(segment: dict[str, Any], *, colour: bool) -> str:
    text = visible(segment["text"], also=_RETURN if colour else _OPEN + _CLOSE)
    if not segment["loss"]:
        return text
    if not colour:
        return f"{_OPEN}{text}{_CLOSE}"
    # Line by line, since pagers end a colour at the end of a line; a newline has no colour, so a sign stands for it.
    lines = text.replace("\n", f"{_RETURN}\n").split("\n")
    return "\n".join(f"{_ON}{line}{_OFF}" if line else "" for line in lines)


def _format_table(table: list[dict[str, Any]]) -> str:
    rows = [
        f"{row['position']:>7} {row['token_id']:>8} {'-' if row['text'] is None else quoted(row['text'], 30):<32} "
        f"{'x' if row['loss'] else ''}".rstrip()
        for row in table
    ]
    return "\n".join([f"{'token':>7} {'id':>8} {'text':<32} loss", *rows])
