"""A draft's choice of one token, and how sure it is."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Choice(NamedTuple):
    """A proposed token, and by how much its logit is above the next best one."""

    token: int
    """A verifier id."""
    margin: float
    """In logits, 0 or more."""


def choose(logits: Tensor, target_ids: Tensor) -> Choice:
    """Return the choice by logits [D] over the draft vocabulary, which `target_ids` [D] int64 maps to verifier ids."""
    values, places = logits.topk(2)
    return Choice(int(target_ids[int(places[0])]), float(values[0] - values[1]))
