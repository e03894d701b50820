"""The best and worst conversations of evaluations: tokens as text, or as ids, each with its fate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftcache.store.common.errors import InputError
from draftcache.tools.reports.page.evaluations import SplitFigures
from draftcache.tools.reports.shown_conversation import decode_pieces

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_DRAFTS = 2
"""Drafts whose conversations are shown for a split: the best ones."""
FATES = ("prompt", "verified", "accepted", "rejected", "bonus")
"""Style classes, in the order of `draft_train.examples`."""
_CONTROL = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {127: "\u2421", 10: "⏎\n"}


def load_tokenizer(directory: Path) -> Tokenizer:
    """Return the tokenizer in a directory. Raises InputError where there is no tokenizer.json that can be loaded."""
    from tokenizers import Tokenizer

    file = directory / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(file))
    except Exception as exc:  # tokenizers raises Exception itself
        raise InputError(f"--tokenizer {directory}: expected tokenizer.json, could not load one ({exc})") from exc


def shown_conversations(items: Sequence[SplitFigures], tokenizer: Tokenizer | None) -> list[dict[str, Any]]:
    """Return, for each split with examples and the best drafts on it, what the page shows of its conversations."""
    result = []
    for split in dict.fromkeys(item.split for item in items):
        some = [item for item in items if item.split == split and "examples" in item.row]
        some.sort(key=lambda item: -float(item.row["draft"]["acceptance_length"]))
        for item in some[:MOST_DRAFTS]:
            groups = [
                {"kind": kind, "conversations": [_shown(example, tokenizer) for example in item.row["examples"][kind]]}
                for kind in ("best", "worst")
            ]
            result.append({"split": split, "name": item.name, "colour": item.colour, "groups": groups})
    return result


def _shown(example: dict[str, Any], tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return a conversation's `tokens`, a list of text, style class and tooltip, and its figures."""
    ids, fates, proposed = example["token_ids"], example["fates"], example["proposed"]
    pieces = [(at, at + 1, f"{token} ") for at, token in enumerate(ids)]
    if tokenizer is not None:
        pieces = list(decode_pieces(ids, tokenizer))
    tokens = []
    for first, last, text in pieces:
        places = [str(example["first"] + at) for at in range(first, last)]
        wrong = [_named(proposed[place], tokenizer) for place in places if place in proposed]
        # A character of several tokens has the fate of the one that went worst: it is not won before all of them are.
        fate = max(fates[first:last], key=lambda number: (number == 3, number))
        hint = f"the draft proposed {', '.join(wrong)}" if wrong else ""
        tokens.append((text.translate(_CONTROL), FATES[fate], hint))
    return {
        "tokens": tokens,
        "cut": len(ids) < example["tokens"],
        **{name: example[name] for name in ("dataset_index", "acceptance_length", "verify_steps", "first")},
        "length": example["tokens"],
    }


def _named(token: int, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None or tokenizer.id_to_token(token) is None:
        return str(token)
    return repr(tokenizer.decode([token], skip_special_tokens=False))
