"""The verify steps that a running engine makes on a store's conversations, beside those that are counted offline.

A turn is asked for with all that comes before it, greedily and with as many tokens as it has in the store. Where the
verifier wrote the store's text greedily and the engine serves the same verifier, the answers are the store's turns, and
the engine's verify steps can be compared with the offline count. Conversations with another answer are left out of the
comparison, and counted: rounding may flip a near-tie, and text that is not the verifier's own always differs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftcache.store.common.errors import InputError
from draftcache.store.common.progress import progress_bar
from draftcache.store.reader import StoreReader
from draftcache.tools.running_engine import Answer, RunningEngine

TOLERANCE = 0.01
"""The largest relative difference of verify steps that counts as equal: engines compute in bf16, which flips some of a
draft's near-ties.
"""


@dataclass
class Conversation:
    """The engine's answers to one conversation."""

    split: str
    content_hash: str
    turns: int = 0
    tokens: int = 0
    """Tokens that verify steps produced: all of each turn but its first."""
    verify_steps: int = 0
    text_equal: bool = True
    drafted: int = 0
    accepted: Counter[int] = field(default_factory=Counter)

    def add(self, expected: Sequence[int], answer: Answer) -> None:
        """Count the answer to a turn."""
        self.turns += 1
        self.tokens += len(answer.token_ids) - 1
        self.verify_steps += answer.verify_steps
        self.text_equal &= list(expected) == answer.token_ids
        self.drafted += answer.drafted or 0
        self.accepted.update(answer.accepted)


def engine_answers(
    engine: RunningEngine, store: StoreReader, splits: Sequence[str], *, most: int, draft_tokens: int
) -> list[Conversation]:
    """Return the engine's answers to the `most` shortest conversations of the splits that have a prompt.

    Raises InputError where there is none, and where the engine drafts another number of tokens per verify step.
    """
    chosen = _shortest(store, splits, most)
    found = []
    with progress_bar(total=len(chosen), unit="conversation", desc=f"{engine.name} {engine.version}") as bar:
        for split, number, turns in chosen:
            item = store.read(number, ["token_ids", "loss_mask"])
            ids = item.arrays["token_ids"].tolist()
            row = Conversation(split, store.index["content_hash"][number].tobytes().hex())
            for first, end in turns:
                answer = engine.answer(ids[:first], end - first)
                row.add(ids[first:end], answer)
                _require_drafted(engine, answer, draft_tokens)
            found.append(row)
            bar.update(1)
    return found


def _require_drafted(engine: RunningEngine, answer: Answer, draft_tokens: int) -> None:
    if answer.drafted is not None and answer.drafted != draft_tokens * answer.verify_steps:
        raise InputError(
            f"--draft-tokens: expected what the engine at {engine.url} drafts per verify step, "
            f"{answer.drafted / max(1, answer.verify_steps):g}, found {draft_tokens}"
        )


def _shortest(store: StoreReader, splits: Sequence[str], most: int) -> list[tuple[str, int, list[tuple[int, int]]]]:
    """Return split, number and turns of conversations."""
    members = [(split, number) for split in splits for number in store.members(split).tolist()]
    lengths = store.index["tokens"][[number for _, number in members]]
    found = []
    for place in np.argsort(lengths, kind="stable"):
        split, number = members[place]
        if turns := turns_of(store.read(number, ["token_ids", "loss_mask"]).loss_mask):
            found.append((split, number, turns))
        if len(found) == most:
            break
    if not found:
        raise InputError(f"{store.location}: expected conversations with a prompt in {list(splits)}, found none")
    return found


def turns_of(mask: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return first row and end of each turn of a loss mask [T] bool; none where a turn has nothing before it."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False]))))
    turns = list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))
    return [] if turns and turns[0][0] == 0 else turns


def engine_result(
    engine: RunningEngine, answers: Sequence[Conversation], evaluation: dict[str, Any], draft_tokens: int
) -> dict[str, Any]:
    """Return the comparison with an `evaluation` of these conversations, as `evaluate` returns it, as JSON values.

    The figures are those of conversations with equal text. `steps_equal` is None where there is none.
    """
    offline: dict[tuple[str, str], int] = {}
    for split, record in evaluation["conversations"].items():
        steps = np.array(record["counts"]["draft"])[..., 0].sum(-1)
        offline |= {(split, name): int(count) for name, count in zip(record["content_hash"], steps, strict=True)}
    equal = [row for row in answers if row.text_equal]
    expected = sum(offline[row.split, row.content_hash] for row in equal)
    steps, tokens = sum(row.verify_steps for row in equal), sum(row.tokens for row in equal)
    accepted: Counter[int] = sum((row.accepted for row in equal), Counter())
    return {
        "engine": engine.name,
        "version": engine.version,
        "model": engine.model,
        "draft_tokens": draft_tokens,
        "conversations": len(answers),
        "conversations_of_equal_text": len(equal),
        "tokens": tokens,
        "offline_verify_steps": expected,
        "engine_verify_steps": steps,
        "offline_acceptance_length": tokens / max(1, expected),
        "engine_acceptance_length": tokens / max(1, steps),
        "engine_drafted": sum(row.drafted for row in equal),
        "engine_accepted_by_position": [accepted[number] for number in range(draft_tokens)] if accepted else [],
        "steps_equal": abs(steps - expected) <= TOLERANCE * expected if equal else None,
    }
