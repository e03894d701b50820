"""The verdicts on what an engine did with one export."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftcache.store.reader import StoreReader
from draftcache.tools.engine_check.comparison import (
    LEAST_COST,
    MOST_STEPS_APART,
    NEAR_TIE,
    PROPOSAL_MARGIN,
    Walk,
    accepted_by_position,
    first_difference,
    share_apart,
    walk,
)
from draftcache.tools.engine_check.verdicts import Verdict

DRAFTS_COUNTER = "vllm:spec_decode_num_drafts"
BY_POSITION_COUNTER = "vllm:spec_decode_num_accepted_tokens_per_pos"
LEAST_ACCEPTANCE = 1.1
"""Tokens per verify step below which drafts of our own accept too little for equal counts to say something."""
LEAST_AGREEMENT = 0.99
"""Share of the engine's tokens that have to be the verifier's argmax by our own capture; the others are near-ties."""


def differences(plain: Sequence[Sequence[int]], answer: Mapping[str, Any]) -> dict[int, int]:
    """Return by trace where the answer's text first differs from plain decoding's, for those that differ."""
    texts = [item["token_ids"] for item in answer["outputs"]]
    found = {number: first_difference(one, other) for number, (one, other) in enumerate(zip(plain, texts, strict=True))}
    return {number: at for number, at in found.items() if at is not None}


@dataclass(frozen=True)
class Served:
    """What the engine did with an export on all traces."""

    texts: list[list[int]]
    walks: list[Walk] | None
    """The verify steps of each trace, by the engine's proposals; None where these could not be seen."""
    steps: int
    """Verify steps by the engine's own counter, over all traces."""
    accepted: list[int]
    """By the engine's own counter, verify steps by how many draft tokens they accepted at least, from 1 on."""
    near_ties: dict[int, float]
    """Traces whose text differs from plain decoding's from a near-tie on, and its margin."""
    wrong: dict[int, float]
    """Traces whose text differs where there is no near-tie, and the margin there."""
    hook: str | None
    draft_tokens: int

    @classmethod
    def of(
        cls, answer: Mapping[str, Any], margins: Mapping[int, float], *, arithmetic: str, draft_tokens: int
    ) -> Served:
        """Return it from the engine's answer. `margins` are the verifier's, where texts differ."""
        outputs, counters = answer["outputs"], answer["counters"]
        walks = None
        if answer["hook"] is not None:
            walks = [walk(item["token_ids"], item["proposals"] or []) for item in outputs]
        bound = NEAR_TIE[arithmetic]
        return cls(
            texts=[item["token_ids"] for item in outputs],
            walks=walks,
            steps=int(counters[DRAFTS_COUNTER]),
            accepted=[int(number) for number in counters.get(BY_POSITION_COUNTER) or []],
            near_ties={number: margin for number, margin in margins.items() if margin < bound},
            wrong={number: margin for number, margin in margins.items() if margin >= bound},
            hook=answer["hook"],
            draft_tokens=draft_tokens,
        )

    @property
    def steps_seen(self) -> bool:
        """Whether the proposals that were seen make exactly the verify steps that the engine counted."""
        return (
            self.walks is not None
            and all(found.whole for found in self.walks)
            and sum(len(found.steps) for found in self.walks) == self.steps
        )

    @property
    def equal(self) -> list[int]:
        """Traces whose text is plain decoding's."""
        return [number for number in range(len(self.texts)) if number not in self.near_ties | self.wrong]

    @property
    def steps_of_equal(self) -> int:
        """Verify steps of the traces whose text is plain decoding's; of all where steps can't be told by trace."""
        if self.walks is None or not self.steps_seen:
            return self.steps
        return sum(len(self.walks[number].steps) for number in self.equal)


def judge_text(name: str, served: Served, counted: Mapping[str, Any]) -> Verdict:
    """Return whether the text is plain greedy decoding's, and plain decoding's the verifier's own argmaxes."""
    total, agreement = len(served.texts), float(counted["greedy_agreement"])
    found = f"{len(served.equal)} of {total} texts are plain decoding's, {len(served.near_ties)} part at a near-tie"
    if served.wrong:
        found += f", {len(served.wrong)} at a margin of up to {max(served.wrong.values()):.3g} logits"
    found += f"; {100 * agreement:.3f} % of the tokens are our capture's argmax"
    metrics = (
        ("texts", total, "traces"),
        ("texts_equal", len(served.equal), "traces"),
        ("texts_near_tie", len(served.near_ties), "traces"),
        ("greedy_agreement", agreement, "share of tokens"),
    )
    return Verdict(name, "text", not served.wrong and agreement >= LEAST_AGREEMENT, found, metrics)


def judge_steps(name: str, served: Served, counted: Mapping[str, Any], *, own: bool) -> Verdict:
    """Return whether the engine makes the verify steps that were counted offline, and accepts as many draft tokens at
    each position. `own` is a user's own draft.
    """
    seen = served.steps_seen
    kept = served.equal if seen else range(len(served.texts))
    expected = sum(counted["steps"][number] for number in kept)
    steps, apart = served.steps_of_equal, share_apart(served.steps_of_equal, expected)
    length = float(counted["acceptance_length"])
    vacuous = not own and length < LEAST_ACCEPTANCE
    found = (
        f"{steps:,} verify steps in the engine, {expected:,} counted offline on {len(kept)} traces: "
        f"{100 * apart:.2f} % apart (bound {100 * MOST_STEPS_APART:g} %); {length:.3f} tokens per step"
    )
    if vacuous:
        found += f", too few to say something (at least {LEAST_ACCEPTANCE:g})"
    # By position the offline count is of all traces, and draft tokens beyond an answer's end are not counted.
    online, close = None, True
    if served.walks is not None and seen:
        online = accepted_by_position([served.walks[number] for number in kept], served.draft_tokens)
        left_out = sum(counted["steps"]) - expected
        pairs = list(zip(online, counted["accepted"], strict=True))
        close = all(abs(one - other) <= MOST_STEPS_APART * expected + left_out for one, other in pairs)
        found += f"; accepted by position {online}, offline {counted['accepted']}"
    metrics = [
        ("verify_steps", steps, "steps"),
        ("verify_steps_offline", expected, "steps"),
        ("verify_steps_apart", apart, "share"),
        ("traces", len(kept), "traces"),
        ("acceptance_length", length, "tokens/step"),
        *_by_position("accepted", online or []),
        *_by_position("accepted_offline", counted["accepted"]),
        *_by_position("accepted_by_counter", served.accepted),
    ]
    passed = apart <= MOST_STEPS_APART and close and not vacuous
    return Verdict(name, "steps", passed, found, tuple(metrics))


def _by_position(metric: str, numbers: Sequence[int]) -> list[tuple[str, float, str]]:
    return [(f"{metric}@{place}", number, "steps") for place, number in enumerate(numbers, start=1)]


def judge_proposals(
    name: str,
    served: Served,
    traces: Sequence[tuple[Sequence[int], Sequence[int]]],
    store: StoreReader,
    checkpoint: Path,
    *,
    arithmetic: str,
) -> Verdict:
    """Return whether the engine proposes what draftcache's own decoding does, wherever the draft is sure."""
    if served.walks is None:
        return Verdict(name, "proposals", None, "not checked: this vLLM has neither function whose results they are")
    if not served.steps_seen:
        seen = sum(len(found.steps) for found in served.walks)
        return Verdict(
            name, "proposals", None,
            f"not checked: the proposals seen make {seen:,} verify steps, the engine counted {served.steps:,}",
        )  # fmt: skip
    from draftcache.tools.engine_check.own_proposals import chosen_traces, compare_proposals

    equal = served.equal
    lengths = [len(traces[number][0]) for number in equal]
    numbers = [equal[place] for place in chosen_traces([served.walks[number] for number in equal], lengths)]
    margin = PROPOSAL_MARGIN[arithmetic]
    counts = compare_proposals(served.walks, traces, numbers, store, checkpoint, served.draft_tokens, margin)
    found = (
        f"{counts.equal_above:,} of {counts.above:,} proposed tokens with a margin above {margin:g} logits are equal; "
        f"{100 * counts.share_above:.1f} % of the {counts.compared:,} compared are above it, all together "
        f"{counts.equal:,} are equal; largest margin of another choice {counts.largest_differing:.2g}"
    )
    metrics = (
        ("proposals_compared", counts.compared, "tokens"),
        ("proposals_equal", counts.equal / max(counts.compared, 1), "share of compared"),
        ("proposals_margin", margin, "logits"),
        ("proposals_above_margin", counts.share_above, "share of compared"),
        ("proposals_equal_above_margin", counts.equal_above / max(counts.above, 1), "share of those above"),
        ("proposals_largest_differing_margin", counts.largest_differing, "logits"),
    )
    return Verdict(name, "proposals", counts.passed, found, metrics)


def judge_wrong(
    name: str, right: Served, served: Served, mistake: str, proposals: Callable[[], Verdict] | None = None
) -> Verdict:
    """Return whether a wrong export is noticed: it costs so many verify steps that the check of steps would show it.

    A draft that makes little of what is wrong may cost less; then the check of `proposals` has to fail on what the
    engine proposes with the wrong export. It is called only then, and None where proposals are not checked.
    """
    cost = served.steps / max(right.steps, 1) - 1
    found = (
        f"{mistake}: {served.steps:,} verify steps instead of {right.steps:,}, {100 * cost:+.1f} % (at least "
        f"{100 * LEAST_COST:+g} %); {len(served.equal)} of {len(served.texts)} texts are plain decoding's"
    )
    metrics = [
        ("wrong_export_verify_steps", served.steps, f"steps, {mistake}"),
        ("wrong_export_cost", cost, "share of verify steps"),
        ("wrong_export_texts_equal", len(served.equal), "traces"),
    ]
    noticed = cost >= LEAST_COST
    if not noticed and cost > 0 and proposals is not None:
        shown = proposals()
        noticed = shown.passed is False
        found += f"; its proposals {'differ' if noticed else 'do not show it'}: {shown.found}"
        metrics.append(("wrong_export_noticed_by_proposals", float(noticed), "1 = yes"))
    return Verdict(name, "wrong", noticed and not served.wrong, found, tuple(metrics))
