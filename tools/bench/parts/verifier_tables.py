"""The trials of model types as tables: by outcome with every reason, and by families for people to read."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from draftcache.tools.bench.parts.verifier_trial import OUTCOMES, UNBUILDABLE, WORKS, Trial

_REASON = 220


def outcome_table(trials: Sequence[Trial]) -> str:
    """Return the types of each outcome; those that work in one list, the others with a reason each."""
    lines = []
    for outcome in OUTCOMES:
        found = [trial for trial in trials if trial.outcome == outcome]
        lines.append(f"{outcome}: {len(found)}")
        if outcome == WORKS:
            lines.append("  " + ", ".join(trial.model_type for trial in found))
        else:
            lines += [f"  {trial.model_type}: {trial.reason[:_REASON]}" for trial in found]
    return "\n".join([*lines, summary_line(trials)])


def summary_line(trials: Sequence[Trial]) -> str:
    """Return the counts of all outcomes, and the share of the types that were built which work."""
    counts = Counter(trial.outcome for trial in trials)
    built = len(trials) - counts[UNBUILDABLE]
    listed = ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES)
    return f"{len(trials)} types: {listed}; {counts[WORKS] / max(built, 1):.1%} of the {built} that were built work"


def families_table(trials: Sequence[Trial]) -> str:
    """Return a Markdown table of the families, which are folders of transformers.models, by the outcome of their types.

    A family is listed under every outcome that one of its types has; the types are named where they differ.
    """
    families: dict[str, list[Trial]] = defaultdict(list)
    for trial in trials:
        families[trial.family].append(trial)
    lines = ["| outcome | types | families |", "|---|---|---|"]
    for outcome in OUTCOMES:
        listed = []
        for family, members in sorted(families.items()):
            found = [trial.model_type for trial in members if trial.outcome == outcome]
            if len(found) == len(members):
                listed.append(family)
            elif found:
                listed.append(f"{family} ({', '.join(found)})")
        count = sum(trial.outcome == outcome for trial in trials)
        lines.append(f"| {outcome} | {count} | {', '.join(listed)} |")
    return "\n".join([*lines, "", summary_line(trials), ""])
