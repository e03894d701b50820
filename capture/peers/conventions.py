"""What recorded states are, by evidence and not by name: before or after the final norm, of which blocks and rows.

Two kinds of evidence:

- without the model (`judge_last_state`): the final norm's output y of weight w has y / w of RMS 1 in every row (of mean
  0 too for a layer norm), which the state before it has not. And the head's logits of the right state predict the token
  that really follows: better than the tokens that follow other rows, and better than the tokens one row before and
  behind. States of other verifiers, and rows that are off, do not. A late block but the last one can't be told by that,
  and of auxiliary states this evidence says nothing.
- with the model (`compare_with_model`): each state is looked for among the outputs of all blocks, before and after the
  final norm, at the same row and at both neighbours; it has to be nearest to what it should be, and near.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from draftcache.capture.peers.recorded import AFTER, BEFORE
from draftcache.capture.peers.samples import PeerSample
from draftcache.capture.peers.verifier_parts import VerifierParts
from draftcache.capture.verifier.head import head_logits
from draftcache.capture.verifier.load import Verifier
from draftcache.capture.verifier.norm import LAYER_NORM, RMS_NORM
from draftcache.capture.verifier.self_check import row_difference
from draftcache.store.common.errors import InputError

ROWS = 2048
"""Rows that are judged, from the first conversations of the source."""
_NORMED = 0.05
"""Largest median of |rms(y / w) - 1| of a normed state: bfloat16 leaves 0.003 of it, float8 with one scale for all
layers 0.03. Below it lies no residual stream: the RMS of its rows differs from row to row by more."""
_GAIN = 0.2
"""Nats by which the following token has to be likelier than tokens of other rows. Trained verifiers reach 3 and more;
wrong rows or wrong norms of theirs stay below 0 or far behind."""
_NEAR = {torch.float32: 0.02, torch.bfloat16: 0.15}
"""Largest difference to the model's own state: other kernels in bfloat16 drift by 0.01 to 0.1 with depth."""


@dataclass(frozen=True, kw_only=True)
class LastState:
    """What was found about the last state of a source."""

    convention: str
    """ "before" or "after" the final norm."""
    evidence: str
    rows: int
    rms_off_norm: float | None = None
    """Median of |rms(y / w) - 1|."""
    gain_before: float | None = None
    gain_after: float | None = None
    """Nats by which the following token is likelier than tokens of other rows, if the norm is applied (the state being
    from before it), or not."""
    neighbours: float | None = None
    """The same of the likelier one of the tokens one row before and one row behind the following one."""

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}


@torch.inference_mode()
def judge_last_state(parts: VerifierParts, samples: Iterable[PeerSample], stated: str = "") -> LastState:
    """Decide between before and after the final norm without the model; `stated` is what a user says ("" for nothing).

    Raises InputError where neither is plausible, or what was stated contradicts the evidence.
    """
    states, following = _rows(samples)
    norm = copy.deepcopy(parts.final_norm).float()
    off = _off_norm(parts, states)
    finals = {AFTER: states, BEFORE: norm(states[None])[0]}
    gains = {name: _gain(parts, final, following) for name, final in finals.items()}
    normed = off is not None and off <= _NORMED
    best = AFTER if normed else BEFORE if off is not None else max(gains, key=lambda name: gains[name])
    shown = (
        f"rms(y / w) is off 1 by {'unknown' if off is None else f'{off:.3g}'}, and the following token is "
        f"likelier than others by {gains[AFTER]:.2f} nats as it is, by {gains[BEFORE]:.2f} nats with the norm applied "
        f"(the token of a neighbouring row by {(beside := _neighbours(parts, finals[best], following)):.2f})"
    )
    if stated and off is not None and stated != best:
        raise InputError(f"--last-state {stated}: expected states {stated} the final norm, found {best}: {shown}")
    if not stated and not (gains[best] >= _GAIN and gains[best] > beside):
        raise InputError(
            f"expected a last state from before or after the final norm of this verifier, found that neither is "
            f"plausible over {len(states)} rows: {shown}. The states are of another verifier or layer, are off by a "
            "row, or its text is too random to tell: give --probe to compare with the verifier itself, or --last-state "
            "before or after where you know it"
        )
    return LastState(
        convention=stated or best, evidence="stated by the user" if stated else "states and following tokens",
        rows=len(states), rms_off_norm=off, gain_before=gains[BEFORE], gain_after=gains[AFTER], neighbours=beside,
    )  # fmt: skip


def _rows(samples: Iterable[PeerSample]) -> tuple[Tensor, Tensor]:
    """Last states [R, H] float32 and the tokens [R] int64 that follow them, of at most about ROWS rows."""
    states, following = [], []
    for sample in samples:
        states.append(sample.load()[1][: len(sample.token_ids) - 1].float())
        following.append(torch.from_numpy(sample.token_ids[1:]))
        if sum(map(len, states)) >= ROWS:
            break
    return torch.cat(states)[:ROWS], torch.cat(following)[:ROWS]


def _off_norm(parts: VerifierParts, states: Tensor) -> float | None:
    """Median over rows of |rms(y / w) - 1|; None for a norm of another kind."""
    if parts.norm.kind not in (RMS_NORM, LAYER_NORM) or not bool((parts.norm.weight != 0).all()):
        return None
    bias = getattr(parts.final_norm, "bias", None)
    rows = (states - bias.float() if isinstance(bias, Tensor) else states) / parts.norm.weight
    return float((rows.square().mean(-1).sqrt() - 1).abs().median())


def _neighbours(parts: VerifierParts, final: Tensor, following: Tensor) -> float:
    """`_gain` of the better one of both neighbours of the following token: the states may be off by a row."""
    return max(_gain(parts, final[1:], following[:-1]), _gain(parts, final[:-1], following[1:]))


def _gain(parts: VerifierParts, final: Tensor, following: Tensor) -> float:
    """Mean log probability of the following tokens, less that of the tokens that follow other rows."""
    own, others = [], []
    for first in range(0, len(final), 256):
        rows = slice(first, first + 256)
        log_p = torch.log_softmax(head_logits(final[rows], parts.head, parts.head_form), -1)
        own.append(log_p.gather(1, following[rows, None]))
        others.append(log_p.gather(1, following.roll(len(following) // 3)[rows, None]))
    return float((torch.cat(own) - torch.cat(others)).mean())


@dataclass(frozen=True, kw_only=True)
class StateMatch:
    """Which state of the model one recorded state is nearest to, and how near."""

    found: str
    difference: float
    expected: float
    """Difference to what it should be."""


@torch.inference_mode()
def compare_with_model(
    verifier: Verifier, samples: Iterable[PeerSample], layers: tuple[int, ...]
) -> tuple[str, dict[str, float]]:
    """Compare recorded states with those that the loaded verifier computes of the same token ids.

    Returns whether the last state is from before or after the final norm, and the differences by name. Raises
    InputError where a state is not what it should be; the message says which one it is.
    """
    last_block = len(verifier.blocks) - 1
    ours: dict[str, list[Tensor]] = {}
    theirs: list[tuple[Tensor, Tensor]] = []
    count = 0
    for sample in samples:
        token_ids = torch.from_numpy(sample.token_ids[: ROWS // 2])  # states of a prefix don't depend on what follows
        states = verifier.forward(token_ids, tuple(range(last_block + 1)))
        own = {f"the output of block {layer}": tap for layer, tap in states.taps.items()}
        for name, state in (own | {"the final norm's output": states.final}).items():
            ours.setdefault(name, []).append(state.float().cpu())
        aux, last = sample.load()
        theirs.append((aux[: len(token_ids)], last[: len(token_ids)]))
        count += len(token_ids)
        if count >= ROWS // 2:
            break
    dtype = min((item[1].dtype for item in theirs), key=lambda kind: torch.finfo(kind).bits)
    near = _NEAR.get(dtype, _NEAR[torch.bfloat16])
    differences = {}
    for place, layer in enumerate(layers):
        name = f"the output of block {layer}"
        match = _match([item[0][:, place].float() for item in theirs], ours, (name,))
        _require(f"auxiliary state {place}", (name,), match, near)
        differences[f"tap_{layer}"] = match.difference
    behind, normed = f"the output of block {last_block}", "the final norm's output"
    match = _match([item[1].float() for item in theirs], ours, (behind, normed))
    _require("last state", (behind, normed), match, near)
    differences["last_state"] = match.difference
    return AFTER if match.found == normed else BEFORE, differences


def _match(theirs: list[Tensor], ours: dict[str, list[Tensor]], expected: tuple[str, ...]) -> StateMatch:
    """The nearest of our states, at the same row, one row before or one row behind."""
    found: dict[str, float] = {}
    for name, states in ours.items():
        for shift, text in ((0, ""), (1, ", one row too early"), (-1, ", one row too late")):
            pairs = [_shifted(mine, other, shift) for mine, other in zip(states, theirs, strict=True)]
            found[name + text] = row_difference(
                torch.cat([other for _, other in pairs]), torch.cat([mine for mine, _ in pairs])
            )
    best = min(found, key=lambda name: (found[name], name))
    wanted = min(found[name] for name in expected)
    if wanted <= found[best] * 1.02:  # a block that adds next to nothing leaves its neighbours as near
        best = min(expected, key=lambda name: found[name])
    return StateMatch(found=best, difference=found[best], expected=wanted)


def _shifted(mine: Tensor, other: Tensor, shift: int) -> tuple[Tensor, Tensor]:
    """Rows of ours and theirs side by side, where their row p is our row p + shift."""
    if shift == 0:
        return mine, other
    return (mine[1:], other[:-1]) if shift == 1 else (mine[:-1], other[1:])


def _require(state: str, expected: tuple[str, ...], match: StateMatch, near: float) -> None:
    if match.found in expected and match.difference <= near:
        return
    raise InputError(
        f"{state}: expected {' or '.join(expected)} of the verifier, within {near:g} of it, found {match.found} "
        f"nearest, at {match.difference:.3g} ({match.expected:.3g} from what was expected); --layers counts blocks "
        "from 0 in the order of the states in the files (a layer id k of vLLM or SGLang is block k - 1): name those "
        "that were captured, and give the verifier that was"
    )
