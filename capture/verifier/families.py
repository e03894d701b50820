"""The forwards of all model families, and the choice of one for a loaded model.

A family is one folder beside this file, as `nemotron` is: its forward is listed here, the FLOPs of its config.json in
`family_flops`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from draftcache.capture.verifier.forward import FamilyForward, Forward, PlainForward
from draftcache.capture.verifier.nemotron.forward import NemotronForward

FORWARDS: tuple[type[FamilyForward], ...] = (NemotronForward, PlainForward)
"""The most specific first; the last one supports every model."""


def choose_forward(model: Any, body: Any, blocks: nn.ModuleList, final_norm: nn.Module) -> Forward:
    """The first of FORWARDS that supports the model; it gets the reasons why the ones before it do not.

    `body` is the part of the model that runs token ids through its `blocks`.
    """
    reasons: list[str] = []
    for family in FORWARDS:
        reason = family.supports(model)
        if reason is None:
            return family.of(model, body, blocks, final_norm, "; ".join(reasons))
        reasons.append(reason)
    raise AssertionError(f"expected the last of FORWARDS to support every model, found {reasons}")
