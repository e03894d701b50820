"""What is compared, as functions of lists: texts, verify steps, and proposals. Nothing here runs a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

NEAR_TIE = {"float32": 1e-3, "tf32": 1e-2, "bfloat16": 0.25}
"""By arithmetic, the margin of the verifier's two best logits below which two ways of computing may choose differently.
bfloat16 logits of 16 to 32 are 0.125 apart."""
PROPOSAL_MARGIN = {"float32": 0.05, "tf32": 0.2, "bfloat16": 1.0}
"""By arithmetic, the margin of the draft's two best logits above which its choice must be the engine's.

Rounding adds up along a chain of proposals: the largest margin at which a right export was seen to differ is 0.03 in
float32 (a CPU) and 0.15 in TF32 (an H100, one token of 9,381)."""
MOST_STEPS_APART = 0.01
"""Share by which the engine's verify steps may differ from the offline count."""
LEAST_COST = MOST_STEPS_APART
"""Share of more verify steps that a wrong export must cost: more than that, and the check of steps shows it."""


def arithmetic_of(dtype: str, *, on_gpu: bool) -> str:
    """Return in which arithmetic an engine multiplies matrices of this dtype.

    vLLM's Triton kernels (attention, experts, the scan) take float32 products in TF32 on a GPU, of 10 bits.
    """
    return "tf32" if dtype == "float32" and on_gpu else dtype


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Return the first place where two texts differ; None where they are equal."""
    if list(one) == list(other):
        return None
    shared = min(len(one), len(other))
    return next((at for at in range(shared) if one[at] != other[at]), shared)


@dataclass(frozen=True)
class Step:
    """A verify step that starts where `produced` tokens of the answer are known."""

    produced: int
    proposed: tuple[int, ...]
    accepted: int


@dataclass(frozen=True)
class Walk:
    """The verify steps of one answer."""

    steps: tuple[Step, ...]
    whole: bool
    """Whether they reach the answer's end."""


def walk(text: Sequence[int], proposals: Sequence[Sequence[int]]) -> Walk:
    """Return the verify steps that these proposals make of an answer, whose first token the prefill produces.

    A step keeps the proposed tokens that are the text's, up to the first difference, and the text's next token. What an
    engine proposes beyond the answer's end belongs to no step.
    """
    produced, steps = 1, []
    for proposed in proposals:
        if produced >= len(text):
            break
        accepted = 0
        for token in proposed:
            if produced + accepted >= len(text) or token != text[produced + accepted]:
                break
            accepted += 1
        steps.append(Step(produced, tuple(proposed), accepted))
        produced += accepted + 1
    return Walk(tuple(steps), produced >= len(text))


def accepted_by_position(walks: Sequence[Walk], draft_tokens: int) -> list[int]:
    """Return by k how many verify steps accepted more than k draft tokens."""
    return [sum(step.accepted > k for found in walks for step in found.steps) for k in range(draft_tokens)]


def share_apart(found: float, expected: float) -> float:
    """Return by which share of `expected` the two numbers differ."""
    return abs(found - expected) / max(expected, 1)


@dataclass
class ProposalCounts:
    """Counts of proposed tokens that were compared."""

    margin: float
    """The bound above which they must be equal."""
    compared: int = 0
    equal: int = 0
    above: int = 0
    equal_above: int = 0
    chains: int = 0
    largest_differing: float = 0.0
    """The largest margin of a choice that was not the engine's."""
    differing: list[tuple[int, int, int, int, float]] = field(default_factory=list)
    """Of each: trace, tokens of the answer that were known, place in the chain, the engine's token, our margin."""

    def add(self, engine: Sequence[int], ours: Sequence[tuple[int, float]], trace: int = 0, produced: int = 0) -> None:
        """Compare a chain with ours, (token, margin) for each place, up to the first place where they differ.

        What follows a difference was conditioned on another token.
        """
        self.chains += 1
        for place, (theirs, (token, margin)) in enumerate(zip(engine, ours, strict=True)):
            same, sure = theirs == token, margin > self.margin
            self.compared += 1
            self.equal += same
            self.above += sure
            self.equal_above += same and sure
            if not same:
                self.largest_differing = max(self.largest_differing, margin)
                self.differing.append((trace, produced, place, theirs, margin))
                break

    @property
    def share_above(self) -> float:
        """Share of the compared tokens whose margin is above the bound."""
        return self.above / max(self.compared, 1)

    @property
    def passed(self) -> bool:
        """Whether every token above the bound is equal, and there are any."""
        return self.above > 0 and self.equal_above == self.above
