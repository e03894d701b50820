"""What is asked of a model and what comes back: prompts, samples of their answers, and who gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias

import numpy as np

from draftcache.capture.prepare.rows.rejections import RowRejectedError
from draftcache.store.common.files import canonical_json, hash_bytes, hash_json


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt as the model gets it, and where it comes from."""

    token_ids: list[int]
    text: str  # what the ids were made of
    messages: list[dict[str, Any]] | None  # None where the row had token ids
    tools: list[dict[str, Any]] | None
    file: str
    line: int  # from 1
    row_id: Any  # the row's own `id`, or None
    turn: int  # which of the conversation's user turns it ends with, from 0

    @property
    def hash(self) -> str:
        """xxh3-128 of the ids: equal prompts have the same, whatever file they are in."""
        return hash_bytes(np.asarray(self.token_ids, "<u4").tobytes())


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One of the answers that a prompt is to get."""

    prompt: Prompt
    number: int  # from 0
    key: str  # equal for samples whose answers are the same
    seed: int  # 31 bits, of its own


def make_sample(prompt: Prompt, number: int, *, model: str, sampling: dict[str, Any]) -> Sample:
    """Return the sample `number` of a prompt: its key and its seed depend on these arguments alone."""
    settings = canonical_json([model, sampling, number])
    key = hash_bytes(prompt.hash.encode(), settings.encode())
    seed = int(hash_json([sampling["seed"], key])[:8], 16) & 0x7FFF_FFFF
    return Sample(prompt=prompt, number=number, key=key, seed=seed)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The ids that the model wrote, with the token that stopped it, if one did."""

    token_ids: list[int]
    finish_reason: str  # "stop", "length", or the server's word for the end of a tool call
    retokenised: bool = False  # whether the ids were made of the server's text

    @property
    def truncated(self) -> bool:
        """Whether the limit of new tokens ended it."""
        return self.finish_reason == "length"


Outcome: TypeAlias = tuple[Sample, Answer | RowRejectedError]


class Engine(Protocol):
    """Gives answers: a server, or a model in this process. Use as a context manager."""

    model: str
    """What tells this model from others: its name on the server, or the hash of its weights."""
    context_tokens: int | None
    """Tokens of prompt and answer at most; None where that is not known."""

    @property
    def retried(self) -> int:
        """Requests that were sent again so far."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def outcomes(self, samples: Iterator[Sample], finished: Callable[[Sample], bool]) -> Iterator[Outcome]:
        """Yield an outcome for every sample that is not `finished`, in any order. A few samples are read ahead."""
