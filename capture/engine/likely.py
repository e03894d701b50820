"""Whether the last state, the final norm and the head of the verifier's directory give the engine's own logits.

With each conversation the engine says how likely it holds some tokens to be next. The last row of its last state has to
say the same, with or without the final norm: so it is known where that state is from, that rows are not off, and that
norm and head are the weights which are served, whatever the text is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from draftcache.capture.engine.client import Extracted
from draftcache.capture.peers.conventions import LastState
from draftcache.capture.peers.recorded import AFTER, BEFORE
from draftcache.capture.peers.verifier_parts import VerifierParts
from draftcache.capture.verifier.head import head_logits
from draftcache.store.common.errors import InputError

_NEAR = {torch.float32: 1e-3}
_NEAR_ROUNDED = 0.15
"""Largest mean difference in nats. An engine in bfloat16 rounds the norm's output and logits of 16 to 32 to steps of
0.125, where ours are float32; another norm or row is off by nats."""


@torch.inference_mode()
def log_probability_off(parts: VerifierParts, first: Sequence[Extracted], last_state: str) -> float:
    """Mean difference in nats between the engine's log probabilities and those of its last states; NaN for NaN."""
    norm = copy.deepcopy(parts.final_norm)
    device, dtype = parts.head.weight.device, parts.head.weight.dtype
    differences = []
    for item in first:
        last = item.sample.load()[1][-1:].to(device, dtype)
        final = norm(last[None])[0] if last_state == BEFORE else last
        ours = torch.log_softmax(head_logits(final, parts.head, parts.head_form)[0], -1).cpu()
        ids, theirs = list(item.likely), torch.tensor(list(item.likely.values()))
        known = [place for place, number in enumerate(ids) if 0 <= number < len(ours)]
        off = (ours[[ids[place] for place in known]] - theirs[known]).abs()
        differences.append(off.mean() if len(known) == len(ids) else off.new_tensor(torch.inf))
    return float(torch.stack(differences).mean())


def judge_by_engine(parts: VerifierParts, first: Sequence[Extracted]) -> LastState:
    """Whether the last state is from before or after the final norm: what gives the engine's logits more nearly."""
    off = {name: log_probability_off(parts, first, name) for name in (BEFORE, AFTER)}
    best = AFTER if off[AFTER] < off[BEFORE] else BEFORE
    return LastState(convention=best, evidence="the engine's own log probabilities", rows=len(first))


def require_same_logits(parts: VerifierParts, first: Sequence[Extracted], last_state: str, engine: str) -> float:
    """`log_probability_off`, which is near enough. Raises InputError where it is not."""
    off = log_probability_off(parts, first, last_state)
    near = _NEAR.get(first[0].sample.dtype, _NEAR_ROUNDED)
    if off <= near:
        return off
    raise InputError(
        f"{engine}: expected a last state from which norm and head of the verifier's directory make the engine's own "
        f"log probabilities, within {near:g} nats over {len(first)} conversations, found {off:.3g} nats between them "
        f"({last_state} the norm): the engine serves other weights, its last state is of another block or row, or "
        "head and norm compute something else; give the directory that it serves"
    )
