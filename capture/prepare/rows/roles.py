"""The names under which collections of conversations write the roles that chat templates know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from draftcache.store.common.errors import InputError

ROLES = ("system", "developer", "user", "assistant", "tool")
"""The roles that a message can have after it was read."""

_BUILT_IN = {
    **{role: role for role in ROLES},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(
        (
            *("ai", "bard", "bing", "bot", "chatbot", "chatgpt", "claude", "gemini", "gpt", "gpt3", "gpt-3", "gpt-3.5"),
            *("gpt4", "gpt-4", "gpt-4o", "llm", "model"),
        ),
        "assistant",
    ),
    **dict.fromkeys(
        ("function", "function_response", "ipython", "observation", "tool_response", "tool_result"), "tool"
    ),
}


@dataclass(frozen=True)
class RoleMap:
    """Which role a name stands for: the built-in spellings in any case, and `added` ones, whose keys are lower-case."""

    added: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def with_names(cls, names: Iterable[str]) -> RoleMap:
        """Add texts `NAME=ROLE` to the built-in names.

        Raises InputError for any other text, a role that is not one of ROLES, a NAME that is itself one of ROLES, and
        a NAME that is given two roles.
        """
        added: dict[str, str] = {}
        for text in names:
            name, equals, role = text.rpartition("=")
            name, role = _key(name), _key(role)
            if not equals or not name or role not in ROLES:
                raise InputError(f"--role {text!r}: expected NAME=ROLE with a ROLE of {', '.join(ROLES)}")
            if name in ROLES and name != role:
                raise InputError(f"--role {text!r}: expected another NAME, found {name!r}, which is a role of its own")
            if added.setdefault(name, role) != role:
                raise InputError(f"--role {text!r}: expected one ROLE per NAME, found {name}={added[name]} as well")
        return cls(added)

    def role(self, name: str) -> str | None:
        """The role of this name; None for a name that is not known."""
        if name in ROLES:
            return name
        key = _key(name)
        return self.added.get(key) or _BUILT_IN.get(key)


def _key(name: str) -> str:
    return name.strip().lower()
