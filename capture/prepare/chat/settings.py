"""The settings of prepare that decide which text a conversation becomes, and which of it carries loss."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from typing import Any

from draftcache.capture.prepare.chat.rendering import DEFAULT_DATE
from draftcache.store.common.errors import InputError

TURNS = ("auto", "all", "each", "last")
LOSS_MASKS = ("prompt", "tags")
_RESERVED = {"messages", "tools", "documents", "add_generation_prompt", "strftime_now", "return_assistant_tokens_mask"}


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """How conversations are rendered and masked. Raises InputError for a value that is none."""

    turns: str = "auto"
    """Which answers carry loss: `all` in one row, `each` in a row of its own, rendered as it was generated, or the
    `last` alone. `auto` is `each` for a row whose earlier answers the template renders otherwise than they were
    generated, and `all` for any other."""
    template_args: dict[str, Any] = field(default_factory=dict)
    """Variables for the template, such as `enable_thinking`."""
    date: str = DEFAULT_DATE
    """What templates get for today's date, as YYYY-MM-DD."""
    system: str | None = None
    """A system message for rows that have none."""
    loss_mask: str = "prompt"
    """What says which text is an answer: the generation `prompt` (answers.py), or the template's generation `tags`."""
    strict: bool = False
    """Whether a row is set aside of which the template drops text."""

    def __post_init__(self) -> None:
        if self.turns not in TURNS:
            raise InputError(f"--turns: expected one of {', '.join(TURNS)}, found {self.turns!r}")
        if self.loss_mask not in LOSS_MASKS:
            raise InputError(f"--loss-mask: expected one of {', '.join(LOSS_MASKS)}, found {self.loss_mask!r}")
        if self.loss_mask == "tags" and self.turns not in ("auto", "all"):
            raise InputError(f"--loss-mask tags: expected --turns all beside it, found --turns {self.turns}")
        try:
            date.fromisoformat(self.date)
        except ValueError as exc:
            raise InputError(f"--date: expected YYYY-MM-DD, found {self.date!r}") from exc
        if reserved := sorted(_RESERVED & set(self.template_args)):
            raise InputError(f"--template-arg: expected other names than {reserved}, which prepare sets itself")

    def as_json(self) -> dict[str, Any]:
        """The record for a manifest, and for the job's hash."""
        return asdict(self)


def parse_template_args(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse KEY=VALUE pairs. A value that is JSON (true, 3, "text", {...}) is taken as that, any other as text.

    Raises InputError for a pair without a name, and for a name that comes twice.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"--template-arg {pair!r}: expected KEY=VALUE, KEY a variable of the template")
        if key in found:
            raise InputError(f"--template-arg {key}: expected one value, found two")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found
