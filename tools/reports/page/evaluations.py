"""The figures of `draftcache eval` files: which run each belongs to, and comparisons in pairs of conversations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from draftcache.draft_train.acceptance import AcceptanceCounts
from draftcache.draft_train.by_length import figures
from draftcache.draft_train.eval_record import read_evaluation
from draftcache.store.common.errors import InputError
from draftcache.tools.reports.page.runs import Run


@dataclass(frozen=True)
class SplitFigures:
    """What one evaluation says of one split."""

    name: str
    """The draft's name on the page."""
    colour: int
    split: str
    body: dict[str, Any]
    """The whole content of the file."""
    path: Path

    @property
    def row(self) -> dict[str, Any]:
        """The split's figures: `draft`, `untrained`, perhaps `bigram` and others."""
        found: dict[str, Any] = self.body["splits"][self.split]
        return found

    @property
    def pairs_with(self) -> tuple[str, ...]:
        """Evaluations that agree in this are of the same conversations, counted alike."""
        kept = self.body["conversations"][self.split]["content_hash"]
        made = (self.body["store_hash"], self.body["draft_tokens"], self.body["length_buckets"])
        return tuple(map(str, (self.split, *made, kept)))

    def counts(self) -> AcceptanceCounts:
        """Return the counts of every conversation."""
        table = np.array(self.body["conversations"][self.split]["counts"]["draft"], np.int64)
        return AcceptanceCounts(
            draft_tokens=self.body["draft_tokens"],
            edges=tuple(self.body["length_buckets"]),
            members=len(table),
            by_conversation=table,
            proposals=np.array(self.row["draft"]["proposals"], np.int64),
            accepted=np.array(self.row["draft"]["accepted"], np.int64),
        )


def evaluations_beside(run: Path) -> list[Path]:
    """Return the evaluation files in a run's directory: eval*.json."""
    found = []
    for path in sorted(run.glob("eval*.json")):
        try:
            read_evaluation(path)
        except InputError:
            continue
        found.append(path)
    return found


def read_split_figures(paths: Sequence[Path], runs: Sequence[Run]) -> list[SplitFigures]:
    """Return the figures of all files by split, in the order of the runs. Of a draft and split, the latest step counts.

    A file belongs to the run whose checkpoint it names; others are named after the checkpoint. Raises InputError for
    a file that is none of `draftcache eval`.
    """
    places = {run.path.resolve(): number for number, run in enumerate(runs)}
    found: dict[tuple[int, str, str, str], SplitFigures] = {}
    strangers: dict[Path, int] = {}
    for path in paths:
        body = read_evaluation(path)
        checkpoint = Path(body["checkpoint_path"])
        directory = checkpoint.parent.parent
        place = places.get(directory.resolve())
        if place is None:
            place = len(runs) + strangers.setdefault(directory, len(strangers))
        name = runs[place].name if place < len(runs) else f"{directory.name}/{checkpoint.name}"
        for split in body["splits"]:
            item = SplitFigures(name=name, colour=place, split=split, body=body, path=path)
            key = (place, split, body["store_hash"], str(body["length_buckets"]))
            if key not in found or found[key].body["step"] <= body["step"]:
                found[key] = item
    return [found[key] for key in sorted(found, key=lambda key: key[0])]


def paired(items: Sequence[SplitFigures]) -> list[dict[str, Any]]:
    """Return the comparisons of drafts that were measured on the same conversations.

    Each has the `split`, `best`, the draft with the longest acceptance, and `differences` of it to each other draft, as
    `by_length.figures` returns them.
    """
    result = []
    ordered = sorted(items, key=lambda item: item.pairs_with)
    for _, group in groupby(ordered, key=lambda item: item.pairs_with):
        members = sorted(group, key=lambda item: item.colour)
        found = {item.name: item.counts() for item in members}
        if len(found) < 2:
            continue
        best = max(found, key=lambda name: found[name].acceptance_length)
        body, split = members[0].body, members[0].split
        lengths = np.array(body["conversations"][split]["length"], np.int64)
        made = figures(found, lengths, compare=[(best, name) for name in found if name != best])
        result.append({"split": split, "best": best, "differences": made["differences"]})
    return sorted(result, key=lambda row: [item.split for item in items].index(row["split"]))
