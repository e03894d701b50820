"""Find the block of one forward that each state of another forward is, and the one offset between their numberings.

A state b fits the block whose output a has the smallest |a - b| / |b| (Frobenius norms, float32), if this difference
is within the tolerance. One row with massive activations can outweigh all others in that norm, so the mean of the
rows' cosines, which counts every row alike, has to agree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from draftcache.store.common.errors import InputError
from draftcache.tools.probe.files import (
    EMBEDDINGS_BLOCK,
    StateFile,
    StateTensor,
    read_dump,
    read_states,
)

TOLERANCE = 0.05
"""The demo's verifier in bfloat16 is 0.004 to 0.008 from float32, and neighbouring blocks are 0.15 to 0.5 apart."""

_COSINE_SLACK = 1e-4  # smaller differences of cosines are float32 and bfloat16 rounding, and tell no blocks apart


@dataclass(frozen=True, kw_only=True)
class Match:
    """The block that one state of OTHER is, or the problem with it."""

    name: str
    number: int | None
    """The state's id in OTHER's convention."""
    best: str | None = None
    """The nearest of our states; None if the values are no states, such as zeros or NaN."""
    block: int | None = None
    """The block of the nearest state: -1 for the embeddings, None for the final norm."""
    difference: float | None = None
    cosine: float | None = None
    second: str | None = None
    second_difference: float | None = None
    problem: str | None = None

    @property
    def offset(self) -> int | None:
        """The state's id minus its block, or None if it fits no block."""
        if self.problem or self.number is None or self.block is None:
            return None
        return self.number - self.block


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The result: `fits` if every state of OTHER is one of our states and one offset holds for all of their ids."""

    matches: list[Match]
    rows: int
    """Number of tokens that were compared."""
    offset: int | None
    taps: dict[int, int]
    """The ids of our taps of interest in OTHER's convention, by block number. Empty without an offset."""
    fits: bool
    verdict: str
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON values, each match with its `offset`."""
        return asdict(self) | {"matches": [asdict(match) | {"offset": match.offset} for match in self.matches]}


def compare_files(
    ours: Path,
    other: Path,
    *,
    ids: tuple[int, ...] | None = None,
    layer_axis: int | None = None,
    tolerance: float = TOLERANCE,
) -> Comparison:
    """Compare a dump with another file of states; `files.read_states` explains `ids` and `layer_axis`.

    Raises InputError if the two can't be compared: other token ids, another hidden size, files of another form.
    """
    if not 0 < tolerance < 1:
        raise InputError(f"--tolerance: expected a number between 0 and 1, found {tolerance}")
    mine, theirs = read_dump(ours), read_states(other, ids=ids, layer_axis=layer_axis)
    if mine.hidden_size != theirs.hidden_size or len({state.values.shape[1] for state in theirs.states}) != 1:
        found = sorted({state.values.shape[1] for state in theirs.states})
        raise InputError(
            f"{other}: expected hidden size {mine.hidden_size} as in {ours}, found {found}; another model?"
        )
    rows, notes = _common_rows(mine, theirs)
    matches = [_match(state, mine.states, rows, tolerance) for state in theirs.states]
    return _judge(mine, theirs, matches, rows, notes)


def _common_rows(mine: StateFile, theirs: StateFile) -> tuple[int, list[str]]:
    """Return the number of leading tokens that both files have states of, and notes about it.

    Comparing a prefix is sound, because a causal model's states don't depend on the tokens that follow. Raises
    InputError if the token ids differ.
    """
    common = min(len(mine.token_ids), len(theirs.token_ids))
    differing = np.flatnonzero(mine.token_ids[:common] != theirs.token_ids[:common])
    if differing.size:
        at = int(differing[0])
        raise InputError(
            f"{theirs.path}: expected the token ids of {mine.path}, found another at position {at}: "
            f"{theirs.token_ids[at]} instead of {mine.token_ids[at]} ({differing.size} of {common} differ); give the "
            "engine the ids themselves, not the text, and no BOS beside them"
        )
    rows = min(state.values.shape[0] for state in (*mine.states, *theirs.states))
    if rows == len(mine.token_ids) == len(theirs.token_ids):
        return rows, []
    note = f"compared over the first {rows} tokens: ours has {len(mine.token_ids)}, the other {len(theirs.token_ids)}"
    fewest = min(state.values.shape[0] for state in theirs.states)
    if fewest < len(theirs.token_ids):
        note += f", and states of {fewest}: the last token is missing"
    return rows, [note]


def _match(state: StateTensor, ours: Sequence[StateTensor], rows: int, tolerance: float) -> Match:
    found = Match(name=state.name, number=state.number)
    values = state.rows(rows)
    if problem := _broken(values):
        return replace(found, problem=problem)
    measured = [(item, *_distance(item.rows(rows), values)) for item in ours]
    measured.sort(key=lambda item: item[1])
    best, difference, cosine = measured[0]
    found = replace(found, best=_label(best), block=best.number, difference=difference, cosine=cosine)
    if len(measured) > 1:
        found = replace(found, second=_label(measured[1][0]), second_difference=measured[1][1])
    if not (difference <= tolerance and 1 - cosine <= tolerance):
        return replace(found, problem=f"no block within {tolerance:g}")
    by_cosine, _, highest = max(measured, key=lambda item: item[2])
    if highest > cosine + _COSINE_SLACK:
        return replace(found, problem=f"ambiguous: by cosine {_label(by_cosine)} is nearer ({highest:.5f})")
    return found


def _broken(values: NDArray[np.float32]) -> str | None:
    """Return why these rows are no states, or None if they are. Engines have shipped captures of zeros and of NaN."""
    if bad := int((~np.isfinite(values)).any(axis=1).sum()):
        return f"NaN or infinity in {bad} of {len(values)} rows"
    zero = int((values == 0).all(axis=1).sum())
    if zero == len(values):
        return "all zeros"
    return f"{zero} of {len(values)} rows are all zeros" if zero else None


def _distance(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> tuple[float, float]:
    """Return |a - b| / |b| and the mean cosine of the rows."""
    difference = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosines = np.einsum("ij,ij->i", ours, theirs) / np.maximum(norms, np.finfo(np.float32).tiny)
    return difference, float(cosines.mean())


def _label(state: StateTensor) -> str:
    if state.number is None:
        return "final norm"
    return "embeddings" if state.number == EMBEDDINGS_BLOCK else f"block {state.number}"


def _judge(mine: StateFile, theirs: StateFile, matches: list[Match], rows: int, notes: list[str]) -> Comparison:
    """Judge all matches together: find the one offset, and whether it holds for every state."""
    offsets = sorted({match.offset for match in matches if match.offset is not None})
    offset = offsets[0] if len(offsets) == 1 else None
    details = mine.details or {}
    blocks = int(details["verifier"]["layers"])
    matches = [_with_final_norm_judged(match, offset, blocks - 1) for match in matches]
    bad = [match for match in matches if match.problem]
    held = {state.number for state in mine.states}
    if missing := [block for block in range(blocks) if block not in held]:
        notes = [*notes, f"ours holds no output of block {', '.join(map(str, missing))}: nothing can match those"]
    taps = {} if offset is None else {int(layer): int(layer) + offset for layer in details["layers"]}
    # Indices in a stack are ids only if the stack holds every state, from block 0 or the embeddings on.
    ids_unknown = theirs.by_position and (offset not in (0, 1) or len(matches) < blocks)
    fits = offset is not None and not bad and not ids_unknown
    if ids_unknown:
        taps = {}
    verdict = _verdict(matches, offsets, len(bad), "place" if theirs.by_position else "engine id", ids_unknown)
    return Comparison(matches=matches, rows=rows, offset=offset, taps=taps, fits=fits, verdict=verdict, notes=notes)


def _with_final_norm_judged(match: Match, offset: int | None, last_block: int) -> Match:
    """Return the match, with a problem if it is the final norm's output under a block's id, or the other way round.

    The final norm's output comes after the last block's output or, as with Hugging Face, instead of it.
    """
    if match.problem or match.best is None:
        return match
    if match.block is not None:
        if match.number is None:
            return replace(match, problem=f"expected the state after the final norm, found {match.best}")
        return match
    if match.number is not None and offset is not None and match.number - offset < last_block:
        return replace(
            match, problem=f"expected the output of block {match.number - offset}, found the state after the final norm"
        )
    return match


def _verdict(matches: list[Match], offsets: list[int], bad: int, number: str, ids_unknown: bool) -> str:
    if not offsets:
        return f"does not fit: none of the {len(matches)} states is the output of one of our blocks"
    if ids_unknown:
        blocks = [match.block for match in matches if match.offset is not None]
        return f"does not fit: expected the ids of the stacked states, found only places; give --ids. Blocks: {blocks}"
    if len(offsets) > 1:
        return f"does not fit: expected one offset id - block for all states, found {offsets}"
    sign = "+" if offsets[0] > 0 else "-"
    formula = f"{number} = block" + (f" {sign} {abs(offsets[0])}" if offsets[0] else "")
    count = f"{len(matches) - bad} of {len(matches)} states"
    return f"does not fit: {formula} holds for {count}" if bad else f"fits: {formula}, for {count}"
