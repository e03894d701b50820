"""D-PACE: weights of a draft's steps by how much the length of its proposals depends on each."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 0.5
"""The share a of `d_pace_weights`."""


def d_pace_weights(realised: Tensor) -> Tensor:
    """Return the weights [S, steps] of the steps of start rows, by how much acceptance depends on each.

    `realised` [S, steps] is the draft's probability of the token that the text has next, and -1 at steps that carry no
    loss, all of which come last. With q~ = (1 - a) q + a and a = 0.5, the weight of step k is the sum over the loss
    steps m >= k of q~_0 .. q~_m: the length that the draft is expected to gain there and later. No gradient flows
    through it. The share a keeps a wrong first
    token from silencing all later ones.
    """
    blended = (1.0 - FLOOR) * realised.detach().double() + FLOOR
    reached = torch.cumprod(torch.where(realised < 0, 0.0, blended), dim=1)
    return reached.flip(1).cumsum(1).flip(1).to(torch.float32)
